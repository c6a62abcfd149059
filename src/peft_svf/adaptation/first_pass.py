# SPDX-License-Identifier: Apache-2.0
"""
The first pass that finds out which kind of request a prompt is: prompts -> a `Mixture` each (arXiv 2501.06252, 3.3).

The base model, a classifier expert, or a linear probe on hidden states decides. A temperature, a calibration or a
probe can be fitted to a few prompts of known kind. The model is left as it was.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..evaluation import choice_logps, complete, context_of
from ..experts.expert import OTHER, Mixture
from ..experts.library import ExpertLibrary
from ..rows import Prompt, chat_text, encode, prompt_ids
from ..tasks import dispatch_prompt
from ..tasks.competition_math import boxed
from .probe import Probe
from .probe import temperature as temperature_of

STRATEGIES = ("prompt", "classifier", "probe")
READINGS = ("likelihood", "channel", "generate")
FALLBACKS = ("base", "mix")
ANYTHING_ELSE = "anything else"  # describes "other" in the prompt
QUESTION_TOKENS = 256  # of a request that are read, so that the first pass is bounded
PLACE = "<request>"  # stands for the request in a chat template
LABEL_TOKENS = 48  # that `read="generate"` writes at most


@dataclass(frozen=True)
class FirstPass:
    """
    How the expert of a prompt is chosen. It is called as [`dispatch`]: `FirstPass("classifier")(library, ...)`.

    Args:
        strategy (`str`):
            `"prompt"` reads the base model, `"classifier"` the library's classifier expert, `"probe"` a linear probe.
        read (`str`, *optional*):
            `"likelihood"` scores the names as answers to the request. `"channel"` goes the other way (noisy channel,
            arXiv 2108.04106): it scores the request after "The user asks for ...", once for each kind; small models
            are better at it, and it reads the request as often as there are kinds. `"generate"` is the paper's form:
            the model writes `\\boxed{name}`, greedily and within 48 tokens; anything else becomes `"other"` with
            confidence 0. Default: `"channel"` for `"prompt"`, and `"likelihood"`, its training task, for
            `"classifier"`.
        threshold (`float`):
            Below this confidence, `fallback` decides; above 1 it always does.
        temperature (`float`):
            Divides the scores before the softmax, see [`fit_temperature`].
        fallback (`str`):
            `"base"`, or `"mix"`: all experts by their probabilities.
        soft (`bool`):
            Use the probabilities as weights in every decision; that of `"other"` is the base model's share.
        calibration ([`Probe`], *optional*):
            Small models have a favourite answer. [`fit_calibration`] takes it out.
        probe ([`Probe`], *optional*):
            For the strategy `"probe"`, see [`fit_probe`].

    Raises:
        `ValueError`: for an unknown strategy, reading or fallback, options that don't go together, a negative
            threshold, or a temperature that isn't positive.
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
        choices = {"strategy": STRATEGIES, "read": (None, *READINGS), "fallback": FALLBACKS}
        for name, options in choices.items():
            if getattr(self, name) not in options:
                listed = ", ".join(repr(option) for option in options if option)
                raise ValueError(f"A first pass has no {name}={getattr(self, name)!r}: choose one of {listed}.")
        if self.strategy == "probe" and self.probe is None:
            raise ValueError("strategy='probe' needs a probe: fit one with fit_probe(...), or Probe.load(folder).")
        if self.strategy != "probe" and self.probe is not None:
            raise ValueError(f"A probe goes with strategy='probe', not with {self.strategy!r}.")
        if self.calibration is not None and (self.strategy == "probe" or self.read == "generate"):
            raise ValueError("A calibration weighs likelihoods, which a probe and read='generate' don't have.")
        if self.strategy == "probe" and self.read is not None:
            raise ValueError(f"read={self.read!r} goes with 'prompt' or 'classifier': a probe reads hidden states.")
        if not (isinstance(self.threshold, Real) and self.threshold >= 0):
            raise ValueError(f"The threshold is a confidence from 0 to 1, got {self.threshold!r}.")
        if not (isinstance(self.temperature, Real) and 0 < self.temperature < math.inf):
            raise ValueError(f"The temperature must be a positive number, got {self.temperature!r}.")

    def __call__(
        self,
        library: ExpertLibrary,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        batch_size: int = 16,
    ) -> list[Mixture]:
        """Choose a mixture for each prompt, see [`dispatch`]."""
        return dispatch(library, tokenizer, prompts, self, batch_size)

    @property
    def reading(self) -> str | None:
        """The way of reading: `read`, or the strategy's default."""
        return self.read or {"prompt": "channel", "classifier": "likelihood"}.get(self.strategy)

    def check(self, library: ExpertLibrary) -> None:
        """Raise a `ValueError` if the library has no classifier, or other experts than those fitted to."""
        names = [*library.names, OTHER]
        if self.strategy == "classifier" and library.classifier is None:
            raise ValueError("strategy='classifier' needs a classifier expert: pass classifier=... with the experts.")
        if self.probe is not None and (unknown := sorted({*self.probe.labels} - {*names})):
            raise ValueError(
                f"The probe names {unknown[0]!r}, but the experts are {', '.join(library.names)}: fit it with these "
                "names."
            )
        if self.calibration is not None:
            fitted = {key: self.calibration.provenance.get(key) for key in ("names", "strategy", "read")}
            if fitted != (expected := {"names": names, "strategy": self.strategy, "read": self.reading}):
                raise ValueError(
                    f"The calibration was fitted to {fitted}, but this first pass has {expected}: fit it with "
                    "fit_calibration(...) for these."
                )


DEFAULT = FirstPass()


def dispatch(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    first_pass: FirstPass = DEFAULT,
    batch_size: int = 16,
) -> list[Mixture]:
    """
    Choose one expert, or the base model, for each prompt.

    Args:
        library ([`ExpertLibrary`]):
            The experts; the model reads their names and descriptions.
        tokenizer (`PreTrainedTokenizerBase`):
            The base model's tokenizer; it needs no pad token.
        prompts (`Sequence[str | list[dict]]`):
            Texts or chats. The last user message of a chat is read, and at most 256 tokens of either.
        first_pass ([`FirstPass`]):
            How to choose.
        batch_size (`int`):
            Prompts per forward.

    Returns:
        `list[Mixture]` with confidence and probabilities; one-hot or empty unless they are mixed. The same for the
        same input.

    Raises:
        `ValueError`: if the library lacks what the first pass needs, or a prompt exceeds the model's context.
    """
    with library.lock:
        first_pass.check(library)
        names = [*library.names, OTHER]
        if first_pass.reading == "generate":
            rows = _written(library, tokenizer, prompts, first_pass, batch_size)
        else:
            scores = kind_scores(library, tokenizer, prompts, first_pass, batch_size)
            rows = (scores.double() / first_pass.temperature).softmax(-1).tolist()
        return [_decide(dict(zip(names, row, strict=True)), first_pass) for row in rows]


def kind_scores(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    first_pass: FirstPass = DEFAULT,
    batch_size: int = 16,
) -> Tensor:
    """
    Score each kind for each prompt; arguments as in [`dispatch`].

    Returns:
        `torch.Tensor` of shape `(prompts, experts + 1)`, the experts by name and `"other"` last. Its softmax are
        probabilities; `-inf` for a kind that the probe or calibration wasn't fitted to.

    Raises:
        `ValueError`: as [`dispatch`], and for `read="generate"`, which has no scores.
    """
    with library.lock:
        first_pass.check(library)
        if first_pass.reading == "generate":
            raise ValueError("read='generate' writes a name and scores none: choose 'likelihood' or 'channel'.")
        names = [*library.names, OTHER]
        if not prompts:
            return torch.zeros(0, len(names))
        if (probe := first_pass.probe) is not None:
            states = features(library, tokenizer, prompts, probe.provenance["kinds_listed"], batch_size)
            return _placed(probe, states, names)
        questions = [_question(tokenizer, prompt) for prompt in prompts]
        score = _likelihoods if first_pass.reading == "likelihood" else _channel
        with torch.no_grad(), library.activate(_reader(library, first_pass)) as model:
            logps = score(model, tokenizer, questions, _kinds(library), batch_size)
        return logps if first_pass.calibration is None else _placed(first_pass.calibration, logps, names)


def _likelihoods(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], kinds: Mapping[str, str], size: int
) -> Tensor:
    """Compute the log-likelihood of each kind's name as the answer to each question, `(questions, kinds)`."""
    rows = [{"prompt": dispatch_prompt(question, kinds), "choices": list(kinds)} for question in questions]
    parts = [choice_logps(model, tokenizer, rows[start : start + size]) for start in range(0, len(rows), size)]
    return torch.cat(parts).cpu()


def _channel(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], kinds: Mapping[str, str], size: int
) -> Tensor:
    """Compute the log-likelihood of each question after a system prompt for each kind, `(questions, kinds)`."""
    # questions of similar length share a forward
    distinct = sorted({question for question in questions if question}, key=lambda text: (len(text), text))
    prefixes = [channel_prompt(tokenizer, name, description) for name, description in kinds.items()]
    rows = [{"prompt": prefix, "choices": [question]} for question in distinct for prefix in prefixes]
    parts = [choice_logps(model, tokenizer, rows[start : start + size]).cpu() for start in range(0, len(rows), size)]
    # an empty request is equally likely for each kind
    logps = torch.cat([*parts, torch.zeros(len(kinds), 1)]).view(-1, len(kinds))
    logps -= logps.mean(-1, keepdim=True)  # the length of the question, which would drown the kinds in a fit
    return logps[[distinct.index(question) if question else len(distinct) for question in questions]]


def channel_prompt(tokenizer: PreTrainedTokenizerBase, name: str, description: str) -> str:
    """
    Write the text that a user's request of a kind follows: a system prompt with the kind's description, or its name.

    A tokenizer without a chat template gets a line of text.
    """
    sentence = f"The user asks for {description or name}."
    if tokenizer.chat_template is None:
        return f"{sentence}\n"
    system, user = ({"role": role, "content": text} for role, text in (("system", sentence), ("user", PLACE)))
    try:
        text = chat_text(tokenizer, [system, user])
    except TemplateError:  # Gemma's template refuses a system prompt
        text = ""
    if sentence not in text:  # and others leave it out
        text = chat_text(tokenizer, [{"role": "user", "content": f"{sentence}\n{PLACE}"}])
    writes_bos = tokenizer.bos_token is not None and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    return text.partition(PLACE)[0].removeprefix(tokenizer.bos_token if writes_bos else "")


def _placed(probe: Probe, features: Tensor, names: Sequence[str]) -> Tensor:
    """Give the scores of a probe as `(prompts, kinds)`; it may lack some of the kinds."""
    placed = torch.full((len(features), len(names)), -math.inf)
    placed[:, [names.index(label) for label in probe.labels]] = probe.scores(features)
    return placed


def _kinds(library: ExpertLibrary) -> dict[str, str]:
    """The names to choose from, with their descriptions."""
    return {**library.descriptions, OTHER: ANYTHING_ELSE}


def fit_temperature(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    kinds: Sequence[str],
    first_pass: FirstPass = DEFAULT,
    batch_size: int = 16,
) -> float:
    """
    Fit the temperature of a first pass to a few prompts of known kind, not those that it will be evaluated on.

    Args:
        library, tokenizer, prompts, first_pass, batch_size:
            As in [`dispatch`].
        kinds (`Sequence[str]`):
            The right expert of each prompt, or `"other"`.

    Returns:
        `float` between 0.01 and 100; above 1 if the first pass is surer than it is right.

    Raises:
        `ValueError`: if there isn't one kind for each prompt, or one isn't an expert.
        `ImportError`: without scikit-learn.
    """
    with library.lock:
        names = _check_kinds(library, prompts, kinds)
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

    Args:
        library, tokenizer, prompts, first_pass, batch_size:
            As in [`dispatch`]; the calibration belongs to this strategy and reading.
        kinds (`Sequence[str]`, *optional*):
            The right expert of each prompt, or `"other"`; two prompts or more of each.

    Returns:
        [`Probe`] on log-likelihoods, for `FirstPass(calibration=...)`.

    Raises:
        `ValueError`: without prompts, or for kinds that [`fit_probe`] refuses.
        `ImportError`: for kinds, without scikit-learn.
    """
    if not prompts:
        raise ValueError("A calibration is fitted to prompts, got none.")
    with library.lock:
        names = [*library.names, OTHER]
        if kinds is not None:
            _check_kinds(library, prompts, kinds)
        logps = kind_scores(library, tokenizer, prompts, replace(first_pass, calibration=None), batch_size)
    facts = {"names": names, "strategy": first_pass.strategy, "read": first_pass.reading, **_base(library)}
    if kinds is not None:
        return Probe.fit(logps, kinds, **facts)
    prior = logps.double().softmax(-1).mean(0).log().float()
    return Probe(tuple(names), torch.eye(len(names)), -prior, {"prompts": len(prompts), **facts})


def fit_probe(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    kinds: Sequence[str],
    batch_size: int = 16,
) -> Probe:
    """
    Fit a linear probe on the base model's hidden states to a few prompts of known kind.

    Args:
        library, tokenizer, prompts, batch_size:
            As in [`dispatch`].
        kinds (`Sequence[str]`):
            The right expert of each prompt, or `"other"`; two prompts or more of each.

    Returns:
        [`Probe`], for `FirstPass("probe", probe=...)`.

    Raises:
        `ValueError`, `ImportError`: as [`fit_temperature`] and [`Probe.fit`].
    """
    with library.lock:
        _check_kinds(library, prompts, kinds)
        listed = _kinds(library)
        states = features(library, tokenizer, prompts, listed, batch_size)
    return Probe.fit(states, kinds, kinds_listed=listed, **_base(library))


def _base(library: ExpertLibrary) -> dict[str, str]:
    return {"base_model": library.model.get_base_model().name_or_path}


@torch.no_grad()
def features(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    kinds: Mapping[str, str],
    batch_size: int = 16,
) -> Tensor:
    """
    Read the features of a probe: the base model's hidden state in its middle layer, where it would name the kind.

    Args:
        kinds (`Mapping[str, str]`):
            Names and descriptions that the prompt lists, the same in fitting and use.

    Returns:
        `torch.Tensor` of shape `(prompts, d)`, float32.
    """
    chats = [dispatch_prompt(_question(tokenizer, prompt), kinds) for prompt in prompts]
    _check_fit(library, tokenizer, chats)
    device, parts = next(library.model.parameters()).device, []
    for start in range(0, len(chats), batch_size):
        inputs = dict(encode(tokenizer, chats[start : start + batch_size]).to(device))
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with library.activate(Mixture()) as model:
            output = model(
                **inputs, position_ids=positions, output_hidden_states=True, use_cache=False, logits_to_keep=1
            )
        states = output.hidden_states  # layers + 1 times (B, tokens, d)
        parts.append(states[len(states) // 2][:, -1].float().cpu())
    return torch.cat(parts)


def _check_fit(
    library: ExpertLibrary, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Prompt], room: int = 0
) -> None:
    """Raise a `ValueError` if chats and `room` more tokens exceed the context: their answers would be garbage."""
    longest, limit = max(map(len, prompt_ids(tokenizer, chats)), default=0), context_of(library.model)
    if limit is not None and longest + room > limit:
        raise ValueError(
            f"The first pass reads {longest} tokens and writes up to {room}, but the model's context is {limit}: "
            "shorten the descriptions of the experts."
        )


def _decide(probabilities: dict[str, float], first_pass: FirstPass) -> Mixture:
    """Choose the likeliest kind, or mix all of them by their probabilities."""
    n, best = len(probabilities), max(probabilities.values())
    choice = OTHER if probabilities[OTHER] == best else max(probabilities, key=lambda name: probabilities[name])
    confidence = min(1.0, max(0.0, (best - 1 / n) / (1 - 1 / n)))
    sure = confidence >= first_pass.threshold
    if (first_pass.soft and confidence > 0) if sure else first_pass.fallback == "mix":  # equal ones aren't mixed
        alpha = {name: p for name, p in probabilities.items() if name != OTHER}
    else:
        alpha = {choice: 1.0} if sure and choice != OTHER else {}
    return Mixture(alpha, first_pass.strategy, confidence, probabilities)


def _reader(library: ExpertLibrary, first_pass: FirstPass) -> Mixture:
    """The mixture that reads prompts in the first pass: the classifier expert, or the base model."""
    return Mixture({str(library.classifier): 1.0}) if first_pass.strategy == "classifier" else Mixture()


def _written(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    first_pass: FirstPass,
    size: int,
) -> list[list[float]]:
    """Let the model write a kind for each prompt, and give it probability 1; without one, all kinds are equal."""
    kinds, rows = _kinds(library), []
    # not the model's own settings: the first pass neither samples nor searches with beams
    greedy = GenerationConfig(max_new_tokens=LABEL_TOKENS, eos_token_id=tokenizer.eos_token_id)
    chats = [boxed_prompt(_question(tokenizer, prompt), kinds) for prompt in prompts]
    _check_fit(library, tokenizer, chats, LABEL_TOKENS)
    for start in range(0, len(chats), size):
        with torch.no_grad(), library.activate(_reader(library, first_pass)) as model:
            texts = complete(model, tokenizer, chats[start : start + size], generation_config=greedy)
        for kind in (read_boxed(text, list(kinds)) for text in texts):
            rows.append([1 / len(kinds) if kind is None else float(name == kind) for name in kinds])
    return rows


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


def _check_kinds(library: ExpertLibrary, prompts: Sequence[Prompt], kinds: Sequence[str]) -> list[str]:
    """Return the names to choose from; a `ValueError` if the kinds aren't one of them for each prompt."""
    names = [*library.names, OTHER]
    if not prompts or len(prompts) != len(kinds):
        raise ValueError(
            f"Fitting needs prompts with one kind each; got {len(prompts)} prompts and {len(kinds)} kinds."
        )
    library.check_experts(set(kinds) - {OTHER})
    return names


def _question(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Return the text to classify: the last user message, bounded; `""` if it has no token."""
    if not isinstance(prompt, str):
        users = [message for message in prompt if message.get("role") == "user"] or list(prompt)
        content = users[-1].get("content") or ""
        prompt = (
            content if isinstance(content, str) else " ".join(part["text"] for part in content if part.get("text"))
        )
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    if len(ids) > QUESTION_TOKENS:
        return tokenizer.decode(ids[:QUESTION_TOKENS], skip_special_tokens=True)
    return prompt if ids else ""
