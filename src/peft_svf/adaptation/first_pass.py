# SPDX-License-Identifier: Apache-2.0
"""
The first pass: prompts -> one `Mixture` per prompt (arXiv 2501.06252, section 3.3).

Routing keys, the base model, a classifier expert, or a linear probe on hidden states score the kinds of request. A
temperature, a calibration or a probe can be fitted to a few prompts of known kind. The model is left as it was.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..evaluation import choice_logps, complete, confidence_of, context_of
from ..experts.expert import OTHER, Mixture
from ..experts.key import PLACE, blocks_of, key_ids, read_states
from ..experts.library import ExpertLibrary
from ..rows import Prompt, Reader, chat_text, prompt_ids
from ..tasks import dispatch_prompt
from ..tasks.competition_math import boxed
from .probe import Probe
from .probe import temperature as temperature_of
from .router import key_scores, keys_of, router_of

logger = logging.getLogger(__name__)
OPTIONS = {
    "strategy": ("key", "prompt", "classifier", "probe"),
    "read": (None, "likelihood", "channel", "generate"),
    "fallback": ("base", "mix"),
}
ANYTHING_ELSE = "anything else"  # describes "other" in the prompt
QUESTION_TOKENS = 256  # bounds the cost of a first pass: the rest of a request is not read
LABEL_TOKENS = 48  # bounds what `read="generate"` writes


@dataclass(frozen=True)
class FirstPass:
    r"""
    Settings of a first pass.

    Args:
        strategy (`str`):
            `"key"` compares hidden states with the experts' routing keys, `"prompt"` reads the base model,
            `"classifier"` the library's classifier expert, `"probe"` a linear probe.
        read (`str`, *optional*):
            `"likelihood"` scores the names as answers to the request. `"channel"` (noisy channel, arXiv 2108.04106)
            scores the request after "The user asks for ...", once per kind: slower, and better with small models.
            `"generate"` is the paper's form: the model writes `\boxed{name}`, greedily and within 48 tokens; anything
            else becomes `"other"` with confidence 0. Default: `"channel"` for `"prompt"`, and `"likelihood"`, its
            training task, for `"classifier"`.
        threshold (`float`): Below this confidence, `fallback` decides; above 1 it always does.
        temperature (`float`): Divides the scores before the softmax, see [`fit_temperature`].
        fallback (`str`): `"base"`, or `"mix"`: all experts by their probabilities.
        soft (`bool`): Mix by the probabilities in every decision; `"other"` is the share of the base model.
        calibration ([`Probe`], *optional*): Removes a model's favourite answer, see [`fit_calibration`].
        probe ([`Probe`], *optional*): Required by the strategy `"probe"`, see [`fit_probe`].

    Raises:
        `ValueError`: for unknown settings, or settings that would change nothing.
    """

    strategy: str = "prompt"
    read: str | None = None
    threshold: float = 0.0
    temperature: float = 1.0
    fallback: str = "base"
    soft: bool = False
    calibration: Probe | None = None
    probe: Probe | None = None

    def __post_init__(self) -> None:
        mistakes: dict[str, Any] = {
            f"A first pass has no {name}={getattr(self, name)!r}: choose one of "
            f"{', '.join(repr(option) for option in options if option)}.": getattr(self, name) not in options
            for name, options in OPTIONS.items()
        }
        states = self.strategy in ("key", "probe")
        mistakes |= {
            "A probe and strategy='probe' go together: fit one with fit_probe(...), or Probe.load(folder).":
                (self.strategy == "probe") != (self.probe is not None),
            "Likelihoods alone are calibrated; a probe reads hidden states, and so do keys. Drop it.":
                (states and self.read) or (self.calibration and (states or self.read == "generate")),
            "A first pass needs a threshold of 0 or more and a positive temperature; got "
            f"{self.threshold} and {self.temperature}.":
                not (self.threshold >= 0 and 0 < self.temperature < math.inf),
        }  # fmt: skip
        for message, made in mistakes.items():
            if made:
                raise ValueError(message)

    @property
    def reading(self) -> str | None:
        """`read`, or the default of the strategy."""
        return self.read or {"prompt": "channel", "classifier": "likelihood"}.get(self.strategy)

    def check(self, library: ExpertLibrary) -> None:
        """Raise a `ValueError` if the library lacks a classifier or keys, or has other names than the fit."""
        if self.strategy == "key":
            keys_of(library)
        if self.strategy == "classifier" and library.classifier is None:
            raise ValueError("strategy='classifier' needs a classifier expert: pass classifier=... with the experts.")
        if self.probe:
            library.check_experts({*self.probe.labels} - {OTHER})
        if self.calibration:
            expected = self._calibrated(library)
            fitted = {key: self.calibration.provenance.get(key) for key in expected}
            if fitted != expected:
                raise ValueError(
                    f"The calibration was fitted to {fitted}, but this first pass has {expected}: refit it."
                )

    def _calibrated(self, library: ExpertLibrary) -> dict[str, Any]:
        """Return what a calibration belongs to."""
        return {"names": [*library.names, OTHER], "strategy": self.strategy, "read": self.reading}


DEFAULT = FirstPass()


def default_first_pass(library: ExpertLibrary, tokenizer: Reader) -> FirstPass:
    """Choose the strategy for a library: its classifier, else its experts' keys if all have one, else the prompt."""
    if library.classifier:
        return FirstPass("classifier")
    try:
        router_of(library, tokenizer)
    except ValueError as error:
        if any(library.expert(name).key is not None for name in library.names):
            _warn_once(f"{error} Until then the first pass is 'prompt'.")
        return DEFAULT
    return FirstPass("key")


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def dispatch(
    library: ExpertLibrary,
    tokenizer: Reader,
    prompts: Sequence[Prompt],
    first_pass: FirstPass = DEFAULT,
    batch_size: int = 16,
) -> list[Mixture]:
    """
    Choose one expert, or the base model, for each prompt.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With routing keys it may be the processor.
        prompts (`Sequence[str | list[dict]]`):
            Texts or chats. The last user message of a chat is read, and at most 256 tokens of either.

    Returns:
        `list[Mixture]` with confidence and probabilities; one-hot or empty unless they are mixed. The same for the
        same input.

    Raises:
        `ValueError`: if the library lacks what the first pass needs, or a prompt exceeds the model's context.
    """
    with library.lock:
        return decide(library, kind_scores(library, tokenizer, prompts, first_pass, batch_size), first_pass)


def decide(library: ExpertLibrary, scores: Tensor, first_pass: FirstPass) -> list[Mixture]:
    """Turn scores `(prompts, kinds)` into mixtures: the likeliest kind, or all by their probabilities."""
    names, mixtures = _names(library, first_pass), list[Mixture]()
    for row in (scores.double() / first_pass.temperature).softmax(-1).tolist():
        n, best, probabilities = len(row), max(row), dict(zip(names, row, strict=True))
        choice = OTHER if row[-1] == best else names[row.index(best)]
        confidence = confidence_of(best, n)
        if confidence >= first_pass.threshold:
            mixed, alpha = first_pass.soft and confidence > 0, {choice: 1.0}  # Equal probabilities decide nothing.
        else:
            mixed, alpha = first_pass.fallback == "mix", {}
        chosen = probabilities if mixed else alpha
        weights: dict[str, float] = defaultdict(float)
        for kind, share in chosen.items():
            for expert, weight in library.mixture(kind).alpha.items():
                weights[expert] += share * weight
        name = choice if choice in library.mixtures and chosen is alpha and alpha else ""
        mixtures.append(Mixture(weights, first_pass.strategy, confidence, probabilities, name=name))
    return mixtures


def _names(library: ExpertLibrary, first_pass: FirstPass) -> list[str]:
    """List what a first pass chooses from: the experts, with keys also named mixtures, and `"other"`."""
    return [*(library.keys if first_pass.strategy == "key" else library.names), OTHER]


def kind_scores(
    library: ExpertLibrary,
    tokenizer: Reader,
    prompts: Sequence[Prompt],
    first_pass: FirstPass = DEFAULT,
    batch_size: int = 16,
) -> Tensor:
    """
    Score each kind for each prompt; arguments as in [`dispatch`].

    Returns:
        `torch.Tensor` of shape `(prompts, kinds)`: experts by name, with keys also named mixtures, and `"other"` last.
        Logits, `-inf` for a kind that the probe or calibration wasn't fitted to, or that the model didn't write.
    """
    with library.lock:
        first_pass.check(library)
        names, kinds, fitted = _names(library, first_pass), _kinds(library), first_pass.probe
        if not prompts:
            return torch.zeros(0, len(names))
        if first_pass.strategy == "key":
            return key_scores(library, tokenizer, key_ids(tokenizer, prompts), batch_size)
        if fitted:
            scores = features(library, tokenizer, prompts, fitted.provenance["kinds_listed"], batch_size)
        else:
            classifies, fitted = first_pass.strategy == "classifier", first_pass.calibration
            reads: Any = {"channel": _channel, "likelihood": _likelihoods, "generate": _written}
            questions = [_question(tokenizer, prompt) for prompt in prompts]
            reader = Mixture({str(library.classifier): 1.0} if classifies else {})
            with torch.no_grad(), library.activate(reader) as model:
                scores = reads[first_pass.reading](model, tokenizer, questions, kinds, batch_size)
        if not fitted:
            return scores
        placed = torch.full((len(prompts), len(names)), -math.inf)  # a fit may lack some of the kinds
        placed[:, [names.index(label) for label in fitted.labels]] = fitted.scores(scores)
        return placed


def _likelihoods(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], kinds: Mapping[str, str], size: int
) -> Tensor:
    """Compute the log-likelihood of each kind's name as the answer to each question, `(questions, kinds)`."""
    rows = [{"prompt": dispatch_prompt(question, kinds), "choices": list(kinds)} for question in questions]
    return torch.cat([choice_logps(model, tokenizer, rows[i : i + size]).cpu() for i in range(0, len(rows), size)])


def _channel(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], kinds: Mapping[str, str], size: int
) -> Tensor:
    """Compute the log-likelihood of each question after a system prompt for each kind, `(questions, kinds)`."""
    # Sorting makes questions of similar length share a forward.
    distinct = sorted({question for question in questions if question}, key=lambda text: (len(text), text))
    prefixes = [channel_prompt(tokenizer, name, description) for name, description in kinds.items()]
    rows = [{"prompt": prefix, "choices": [question]} for question in distinct for prefix in prefixes]
    parts = [choice_logps(model, tokenizer, rows[i : i + size]).cpu() for i in range(0, len(rows), size)]
    # An empty request is equally likely for each kind.
    logps = torch.cat([*parts, torch.zeros(len(kinds), 1)]).view(-1, len(kinds))
    logps -= logps.mean(-1, keepdim=True)  # The length of the question would drown the kinds in a fit.
    return logps[[distinct.index(question) if question else len(distinct) for question in questions]]


def _written(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], kinds: Mapping[str, str], size: int
) -> Tensor:
    """Let the model write a kind for each question: 0 for it and `-inf` for others, all 0 if none is readable."""
    # The model's own settings may sample or search with beams; the first pass does neither.
    greedy = GenerationConfig(max_new_tokens=LABEL_TOKENS, eos_token_id=tokenizer.eos_token_id)
    chats = [boxed_prompt(question, kinds) for question in questions]
    _check_context(model, tokenizer, chats, LABEL_TOKENS)
    starts = range(0, len(chats), size)
    texts = [complete(model, tokenizer, chats[start : start + size], generation_config=greedy) for start in starts]
    written = [read_boxed(text, list(kinds)) for batch in texts for text in batch]
    return torch.tensor([[0.0 if kind in (None, name) else -math.inf for name in kinds] for kind in written])


def channel_prompt(tokenizer: PreTrainedTokenizerBase, name: str, description: str) -> str:
    """Write what precedes a request of a kind: a system prompt with its description or name, or a line of text."""
    sentence = f"The user asks for {description or name}."
    if tokenizer.chat_template is None:
        return f"{sentence}\n"
    system, user = ({"role": role, "content": text} for role, text in (("system", sentence), ("user", PLACE)))
    try:
        text = chat_text(tokenizer, [system, user])
    except TemplateError:  # Gemma's template refuses a system prompt.
        text = ""
    if sentence not in text:  # Others leave it out.
        text = chat_text(tokenizer, [{"role": "user", "content": f"{sentence}\n{PLACE}"}])
    writes_bos = tokenizer.bos_token is not None and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    return text.partition(PLACE)[0].removeprefix(tokenizer.bos_token if writes_bos else "")


def boxed_prompt(question: str, kinds: Mapping[str, str]) -> list[dict[str, str]]:
    r"""Write the adaptation prompt of the paper (arXiv 2501.06252, appendix), answered in `\boxed{}`."""
    listed = "\n".join(f"- {name}: {text}" if text else f"- {name}" for name, text in kinds.items())
    text = (
        f"Analyze the given request and classify it into one of {len(kinds)} categories:\n{listed}\n"
        "If it spans several, choose the dominant one. Answer with the category in \\boxed{} notation, for example "
        f"\\boxed{{{next(iter(kinds))}}}.\nRequest: {question}"
    )
    return [{"role": "user", "content": text}]


def read_boxed(text: str, names: Sequence[str]) -> str | None:
    r"""Read the name in the first `\boxed{}` of a text, in any case; `None` without one, or for an unknown one."""
    content = next(iter(boxed(text)), "").strip().removeprefix("\\text{").strip(" \n'\"}")
    return next((name for name in names if name.casefold() == content.casefold()), None)


def features(
    library: ExpertLibrary, tokenizer: Reader, prompts: Sequence[Prompt], kinds: Mapping[str, str], size: int
) -> Tensor:
    """
    Read the middle hidden state of the base model where it would name the kind: `(prompts, d)`, float32.

    `kinds` are the names and descriptions that the prompt lists, the same in fitting and use.
    """
    chats = [dispatch_prompt(_question(tokenizer, prompt), kinds) for prompt in prompts]
    with library.activate(Mixture()) as model:
        _check_context(model, tokenizer, chats)
        middle = (len(blocks_of(model)) + 1) // 2
        return read_states(model, prompt_ids(tokenizer, chats), middle, "last", size)


def fit_temperature(
    library: ExpertLibrary,
    tokenizer: Reader,
    prompts: Sequence[Prompt],
    kinds: Sequence[str],
    first_pass: FirstPass = DEFAULT,
    batch_size: int = 16,
) -> float:
    """
    Fit the temperature of a first pass to a few prompts of known kind, not those that it will be evaluated on.

    Args:
        kinds (`Sequence[str]`): The right expert of each prompt, or `"other"`.

    Returns:
        `float` between 0.01 and 100; above 1 if the first pass is surer than it is right.
    """
    with library.lock:
        names = _check_kinds(library, prompts, kinds, first_pass)
        scores = kind_scores(library, tokenizer, prompts, first_pass, batch_size)
        return temperature_of(scores, torch.tensor([names.index(kind) for kind in kinds]))


def fit_calibration(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    kinds: Sequence[str] | None = None,
    first_pass: FirstPass = DEFAULT,
    batch_size: int = 16,
) -> Probe:
    """
    Fit how the log-likelihoods of a first pass are weighed against each other.

    Without kinds, the mean probability of each kind over the prompts becomes its prior, which divides it (batch
    calibration, arXiv 2309.17249): for requests as they come, with about as many of each kind. With kinds, a logistic
    regression on the log-likelihoods: a bias, and a scale for each pair of kinds.

    Returns:
        [`Probe`] on log-likelihoods, for a first pass of this strategy and reading.
    """
    with library.lock:
        names = _check_kinds(library, prompts, kinds, first_pass)
        logps = kind_scores(library, tokenizer, prompts, replace(first_pass, calibration=None), batch_size)
        facts = {**first_pass._calibrated(library), "base_model": library.model.get_base_model().name_or_path}
    if kinds is not None:
        return Probe.fit(logps, kinds, **facts)
    prior = logps.double().softmax(-1).mean(0).log().float()
    return Probe(tuple(names), torch.eye(len(names)), -prior, {"prompts": len(prompts), **facts})


def fit_probe(
    library: ExpertLibrary, tokenizer: Reader, prompts: Sequence[Prompt], kinds: Sequence[str], batch_size: int = 16
) -> Probe:
    """Fit a linear probe on the base model's hidden states to two or more prompts of each kind."""
    with library.lock:
        _check_kinds(library, prompts, kinds)
        listed, base = _kinds(library), library.model.get_base_model().name_or_path
        states = features(library, tokenizer, prompts, listed, batch_size)
    return Probe.fit(states, kinds, kinds_listed=listed, base_model=base)


def _kinds(library: ExpertLibrary) -> dict[str, str]:
    """Return the names to choose from, with their descriptions."""
    return {**library.descriptions, OTHER: ANYTHING_ELSE}


def _check_kinds(
    library: ExpertLibrary, prompts: Sequence[Prompt], kinds: Sequence[str] | None, first_pass: FirstPass = DEFAULT
) -> list[str]:
    """Return the names to choose from; a `ValueError` if nothing can be fitted to these prompts and kinds."""
    if not prompts or (kinds is not None and len(prompts) != len(kinds)) or first_pass.reading == "generate":
        raise ValueError(
            "Fitting needs prompts with one kind each, and a first pass that scores all kinds; got "
            f"{len(prompts)} prompts, the kinds {kinds} and read={first_pass.reading!r}."
        )
    names = _names(library, first_pass)
    library.check_experts({*(kinds or ())} - {*names})
    return names


def _check_context(model: Any, tokenizer: Reader, chats: Sequence[Prompt], room: int = 0) -> None:
    """Raise a `ValueError` if chats and `room` more tokens exceed the context: their answers would be garbage."""
    longest, limit = max(map(len, prompt_ids(tokenizer, chats))), context_of(model)
    if limit is not None and longest + room > limit:
        raise ValueError(
            f"The first pass reads {longest} tokens and writes up to {room}, but the model's context is {limit}: "
            "shorten the descriptions of the experts."
        )


def _question(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Return the text to classify: the last user message, bounded; `""` if it has no token."""
    if not isinstance(prompt, str):
        users = [message for message in prompt if message.get("role") == "user"] or list(prompt)
        prompt = users[-1].get("content") or ""
        if not isinstance(prompt, str):
            prompt = " ".join(part["text"] for part in prompt if part.get("text"))
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    if len(ids) > QUESTION_TOKENS:
        return tokenizer.decode(ids[:QUESTION_TOKENS], skip_special_tokens=True)
    return prompt if ids else ""
