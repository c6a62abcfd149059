# SPDX-License-Identifier: Apache-2.0
"""
The first pass that asks "which kind of request is this": prompts -> a `Mixture` each (arXiv 2501.06252, section 3.3).

The base model, a classifier expert, or a linear probe on hidden states answers. What of it can be fitted to a few
prompts, is: a temperature, a prior, a probe. The model is left as it was.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..evaluation import choice_logps, context_of
from ..experts.expert import OTHER, Mixture
from ..experts.library import ExpertLibrary, no_expert
from ..rows import chat_text, prompt_ids
from ..tasks import dispatch_prompt
from .probe import Probe
from .probe import temperature as temperature_of

Prompt = str | list[dict[str, Any]]
STRATEGIES = ("prompt", "classifier", "probe")
READINGS = ("likelihood", "channel", "generate")
FALLBACKS = ("base", "mix")
ANYTHING_ELSE = "anything else"  # what the prompt says of "other"
CONTENT_FREE = ("", "N/A", "[MASK]")  # requests that say nothing (arXiv 2102.09690)
QUESTION_TOKENS = 256  # of the request that the first pass reads: it is bounded
PLACE = "<request>"  # where a template puts what the user says
LABEL_TOKENS = 48  # of the answer that `read="generate"` waits for
BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*['\"]?([^{}'\"]*?)['\"]?\s*\}")


def dispatch(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    strategy: str = "prompt",
    threshold: float = 0.0,
    calibrate: bool | Probe | None = None,
    batch_size: int = 16,
    read: str | None = None,
    temperature: float = 1.0,
    fallback: str = "base",
    soft: bool = False,
    probe: Probe | None = None,
) -> list[Mixture]:
    """
    Choose one expert, or the base model, for each prompt.

    Args:
        library ([`ExpertLibrary`]):
            The experts; their names and descriptions stand in the question that the model is asked.
        tokenizer (`PreTrainedTokenizerBase`):
            Of the base model.
        prompts (`Sequence[str | list[dict]]`):
            Texts or chats. Of a chat the last user message is read, of either the first 256 tokens.
        strategy (`str`):
            `"prompt"` asks the base model, `"classifier"` the library's classifier expert, `"probe"` a linear probe.
        threshold (`float`):
            Below this confidence `fallback` decides.
        calibrate (`bool` or [`Probe`], *optional*):
            Small models have a favourite answer. `True` divides the likelihoods of the names by their means over
            requests that say nothing (contextual calibration, arXiv 2102.09690), which costs three more rows a call;
            what [`fit_calibration`] found on real requests is better and costs none. Default: neither, for `"prompt"`
            where names are read `True`.
        batch_size (`int`):
            Prompts per forward.
        read (`str`, *optional*):
            `"likelihood"` scores the names as answers to the request. `"channel"` goes the other way (noisy channel,
            arXiv 2108.04106): it scores the request after "The user asks for ...", once for each kind, which small
            models are better at and which reads the request as often as there are kinds. `"generate"` is
            the paper's form: the model writes `\\boxed{name}`, greedily and within 48 tokens; what cannot be read is
            `"other"` with confidence 0. Default: `"channel"` for `"prompt"`, `"likelihood"` for `"classifier"`, which
            is trained on it.
        temperature (`float`):
            Divides the scores before the softmax, see [`fit_temperature`].
        fallback (`str`):
            What a decision below the threshold becomes: `"base"`, or `"mix"`, all experts by their probabilities.
        soft (`bool`):
            Use the probabilities as weights in every decision; that of `"other"` is the base model's share.
        probe ([`Probe`], *optional*):
            For `strategy="probe"`, see [`fit_probe`].

    Returns:
        `list[Mixture]` with confidence and probabilities; one-hot or empty unless they are mixed. The same for the
        same input.

    Raises:
        `ValueError`: for another strategy, reading or fallback, `"classifier"` without a classifier, `"probe"`
            without a probe of these experts, a temperature that is not positive, or a prompt over the context.
    """
    check_strategy(library, strategy, probe)
    if fallback not in FALLBACKS:
        raise ValueError(f"There is no fallback {fallback!r}: choose {' or '.join(map(repr, FALLBACKS))}.")
    if not (isinstance(threshold, (int, float)) and threshold >= 0):
        raise ValueError(f"The threshold is a confidence from 0 to 1, got {threshold!r}; above 1 nothing reaches it.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"The temperature must be a positive number, got {temperature!r}.")
    with library.lock:  # the experts stay the same from beginning to end
        names = [*library.descriptions, OTHER]
        if read == "generate":
            if strategy == "probe":
                raise ValueError('A probe writes no answer: read="generate" goes with "prompt" or "classifier".')
            if calibrate:
                raise ValueError(
                    'What is written has no likelihoods to calibrate: leave calibrate out with "generate".'
                )
            rows = _written(library, tokenizer, prompts, strategy, batch_size)
        else:
            scores = kind_scores(library, tokenizer, prompts, strategy, calibrate, batch_size, probe, read)
            rows = (scores.double() / temperature).softmax(-1).tolist()
        return [_decide(dict(zip(names, row, strict=True)), strategy, threshold, fallback, soft) for row in rows]


def check_strategy(library: ExpertLibrary, strategy: str, probe: Probe | None = None) -> None:
    """Raise a `ValueError` for a strategy that does not exist, or that lacks its classifier or probe."""
    if strategy not in STRATEGIES:
        raise ValueError(f"There is no dispatch strategy {strategy!r}: choose {' or '.join(map(repr, STRATEGIES))}.")
    if strategy == "classifier" and library.classifier is None:
        raise ValueError("strategy='classifier' needs a classifier expert: pass classifier=... with the experts.")
    if strategy == "probe" and probe is None:
        raise ValueError("strategy='probe' needs a probe: fit one with fit_probe(...), or Probe.load(folder).")
    if strategy == "probe" and probe is not None and (odd := sorted({*probe.labels} - {*library.names, OTHER})):
        raise ValueError(
            f"The probe names {odd[0]!r}, but the experts are {', '.join(library.names)}: fit it with these names."
        )


def kind_scores(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    strategy: str = "prompt",
    calibrate: bool | Probe | None = None,
    batch_size: int = 16,
    probe: Probe | None = None,
    read: str | None = None,
) -> Tensor:
    """
    Score each kind for each prompt; arguments as in [`dispatch`], but nothing is generated.

    Returns:
        `torch.Tensor` of shape `(prompts, experts + 1)`, the experts by name and `"other"` last. Its softmax are
        probabilities; `-inf` for a kind that the probe or calibration was not fitted to.
    """
    check_strategy(library, strategy, probe)
    names = [*library.descriptions, OTHER]
    if strategy == "probe" and probe is not None:
        if not prompts:
            return torch.zeros(0, len(names))
        seen = features(library, tokenizer, prompts, probe.provenance["kinds_listed"], batch_size)
        return _placed(probe.scores(seen), probe, names)
    read = read or ("channel" if strategy == "prompt" else "likelihood")
    if read not in READINGS[:2]:
        raise ValueError(f"There is no reading {read!r}: choose {' or '.join(map(repr, READINGS))}.")
    if isinstance(calibrate, Probe):
        found = {"names": calibrate.provenance.get("names"), "read": calibrate.provenance.get("read")}
        if found != {"names": names, "read": read}:
            raise ValueError(
                f"The calibration was fitted to {found['names']} read by {found['read']!r}, but here are {names} read "
                f"by {read!r}: fit it with fit_calibration(...) for these."
            )
    score = _likelihoods if read == "likelihood" else _channel
    if calibrate is None:
        calibrate = (strategy, read) == ("prompt", "likelihood")
    free = CONTENT_FREE if calibrate is True else ()
    questions = [_question(tokenizer, prompt) for prompt in prompts]
    with torch.no_grad(), library.activate(_asked(library, strategy)) as model:
        logps = score(model, tokenizer, [*free, *questions], _kinds(library), batch_size)
    prior, logps = logps[: len(free)], logps[len(free) :]
    if isinstance(calibrate, Probe):
        return _placed(calibrate.scores(logps), calibrate, names)
    return logps - prior.mean(0) if free else logps


def _likelihoods(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], kinds: Mapping[str, str], size: int
) -> Tensor:
    """Log-likelihood of each kind's name as the answer to each question, `(questions, kinds)`."""
    parts = [torch.zeros(0, len(kinds))]
    for start in range(0, len(questions), size):
        part = questions[start : start + size]
        rows = [{"prompt": dispatch_prompt(question, kinds), "choices": list(kinds)} for question in part]
        parts.append(choice_logps(model, tokenizer, rows).cpu())
    return torch.cat(parts)


def _channel(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], kinds: Mapping[str, str], size: int
) -> Tensor:
    """Log-likelihoods of each question after a system prompt for each kind, minus their mean, `(questions, kinds)`."""
    # alike in length share a forward
    asked = sorted({question for question in questions if question}, key=lambda question: (len(question), question))
    rows: list[dict[str, Any]] = [
        {"prompt": channel_prompt(tokenizer, name, what), "choices": [question]}
        for question in asked
        for name, what in kinds.items()
    ]
    parts = [choice_logps(model, tokenizer, rows[start : start + size]) for start in range(0, len(rows), size)]
    found = torch.cat([torch.zeros(0, 1), *(part.cpu() for part in parts)]).view(-1, len(kinds))
    found -= found.mean(-1, keepdim=True)  # which is the length of the question, and would drown the kinds in a fit
    places = [asked.index(question) if question else len(asked) for question in questions]
    return torch.cat([found, torch.zeros(1, len(kinds))])[places]  # an empty request is as likely for each kind


def channel_prompt(tokenizer: PreTrainedTokenizerBase, name: str, what: str) -> str:
    """
    Write the text after which a user's request of a kind follows: a system prompt that says what is asked for.

    Descriptions say it; a kind without one is told by its name. Without a chat template it is a line of its own.
    """
    said = f"The user asks for {what or name}."
    if tokenizer.chat_template is None:
        return f"{said}\n"
    turns = [{"role": "system", "content": said}, {"role": "user", "content": PLACE}]
    try:
        text = chat_text(tokenizer, turns)
    except TemplateError:  # of a template without a system prompt, such as Gemma's
        text = chat_text(tokenizer, [{**turns[1], "content": f"{said}\n{PLACE}"}])
    writes_bos = tokenizer.bos_token is not None and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    return text.partition(PLACE)[0].removeprefix(tokenizer.bos_token if writes_bos else "")


def _placed(scores: Tensor, probe: Probe, names: Sequence[str]) -> Tensor:
    """Scores `(prompts, labels)` of a probe as `(prompts, kinds)`."""
    found = torch.full((len(scores), len(names)), -math.inf)
    found[:, [names.index(label) for label in probe.labels]] = scores
    return found


def _kinds(library: ExpertLibrary) -> dict[str, str]:
    """The names that can be chosen, each with what it is for."""
    return {**library.descriptions, OTHER: ANYTHING_ELSE}


def fit_temperature(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    kinds: Sequence[str],
    **settings: Any,
) -> float:
    """
    Fit the temperature of [`dispatch`] to a few prompts of known kind, which should not be those it is judged by.

    Args:
        library, tokenizer, prompts:
            As in [`dispatch`].
        kinds (`Sequence[str]`):
            The right expert of each prompt, or `"other"`.
        settings:
            Of [`kind_scores`]: `strategy`, `calibrate`, `batch_size`, `probe`, `read`.

    Returns:
        `float` between 0.01 and 100; above 1 where the first pass is surer than it is right.

    Raises:
        `ValueError`: without prompts, if there is not one kind for each, or one is no expert.
    """
    names = _known_kinds(library, prompts, kinds)
    scores = kind_scores(library, tokenizer, prompts, **settings)
    return temperature_of(scores, torch.tensor([names.index(kind) for kind in kinds]))


def fit_calibration(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    kinds: Sequence[str] | None = None,
    *,
    strategy: str = "prompt",
    read: str | None = None,
    batch_size: int = 16,
) -> Probe:
    """
    Fit how the likelihoods of [`dispatch`] are weighed against each other.

    Without kinds the mean probability of each kind over the prompts becomes its prior, which divides it (batch
    calibration, arXiv 2309.17249): a handful of requests as they come, of all kinds equally often. With kinds a
    logistic regression on the log-likelihoods is fitted, a bias and a scale for each pair of kinds; its confidence is
    that of prompts left out.

    Args:
        library, tokenizer, prompts, strategy, read, batch_size:
            As in [`dispatch`]; the calibration goes with this strategy and reading.
        kinds (`Sequence[str]`, *optional*):
            The right expert of each prompt, or `"other"`; two prompts or more of each.

    Returns:
        [`Probe`] on log-likelihoods, to be passed as `calibrate=` or saved.

    Raises:
        `ValueError`: without prompts, or for kinds that [`fit_probe`] refuses.
    """
    names = [*library.descriptions, OTHER]
    if not prompts:
        raise ValueError("A calibration is fitted to prompts, got none.")
    read = read or ("channel" if strategy == "prompt" else "likelihood")
    base = library.model.get_base_model().name_or_path
    facts: dict[str, Any] = {"names": names, "strategy": strategy, "read": read, "base_model": base}
    if kinds is not None:
        _known_kinds(library, prompts, kinds)
    logps = kind_scores(library, tokenizer, prompts, strategy, False, batch_size, read=read)
    if kinds is not None:
        return Probe.fit(logps, kinds, **facts)
    prior = logps.double().softmax(-1).mean(0).log().float()
    return Probe(tuple(names), torch.eye(len(names)), -prior, {"method": "batch", "prompts": len(prompts), **facts})


def fit_probe(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    kinds: Sequence[str],
    *,
    method: Literal["centroid", "logistic"] = "logistic",
    batch_size: int = 16,
) -> Probe:
    """
    Fit a linear probe on the base model's hidden states to a few prompts of known kind.

    Args:
        library, tokenizer, prompts, batch_size:
            As in [`dispatch`].
        kinds (`Sequence[str]`):
            The right expert of each prompt, or `"other"`; two prompts or more of each.
        method (`str`):
            `"logistic"` or `"centroid"`, see [`Probe.fit`].

    Returns:
        [`Probe`], to be passed as `probe=` or saved.

    Raises:
        `ValueError`: as in [`fit_temperature`] and [`Probe.fit`].
    """
    _known_kinds(library, prompts, kinds)
    listed = _kinds(library)
    found = features(library, tokenizer, prompts, listed, batch_size)
    base = library.model.get_base_model().name_or_path
    return Probe.fit(found, kinds, method=method, kinds_listed=listed, base_model=base)


@torch.no_grad()
def features(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    kinds: Mapping[str, str],
    batch_size: int = 16,
) -> Tensor:
    """
    What a probe sees of prompts: the base model's hidden state in its middle layer, where the kind is to be named.

    Args:
        kinds (`Mapping[str, str]`):
            Names and descriptions that the question lists, the same in fitting and use.

    Returns:
        `torch.Tensor` of shape `(prompts, d)`, float32.
    """
    found = []
    for start in range(0, len(prompts), batch_size):
        questions = [_question(tokenizer, prompt) for prompt in prompts[start : start + batch_size]]
        inputs = _tokens(library, tokenizer, [dispatch_prompt(question, kinds) for question in questions])
        with library.activate(Mixture()) as model:
            states = model(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
        found.append(states[len(states) // 2][:, -1].float().cpu())  # of layers + 1 times (B, tokens, d)
    return torch.cat(found)


def _tokens(
    library: ExpertLibrary, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[dict[str, str]]], room: int = 0
) -> Any:
    """Chats as left-padded ids, mask and positions; a `ValueError` if they and `room` more exceed the context."""
    ids = {"input_ids": prompt_ids(tokenizer, prompts)}
    inputs = tokenizer.pad(ids, return_tensors="pt", padding_side="left")
    length = inputs.input_ids.shape[1]
    limit = context_of(library.model)
    if limit is not None and length + room > limit:
        raise ValueError(
            f"The first pass reads {length} tokens and writes up to {room}, but the model's context is {limit}: "
            "shorten the descriptions of the experts."
        )
    found = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    if not room:  # `generate` counts positions itself
        found["position_ids"] = (inputs.attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {name: tensor.to(next(library.model.parameters()).device) for name, tensor in found.items()}


def _decide(probabilities: dict[str, float], strategy: str, threshold: float, fallback: str, soft: bool) -> Mixture:
    """One decision: the likeliest kind, or all of them by their probabilities."""
    n, best = len(probabilities), max(probabilities.values())
    choice = OTHER if probabilities[OTHER] == best else max(probabilities, key=lambda name: probabilities[name])
    confidence = min(1.0, max(0.0, (best - 1 / n) / (1 - 1 / n)))
    sure = confidence >= threshold
    if (soft and confidence > 0) if sure else fallback == "mix":  # where nothing is known, nothing is mixed
        alpha = {name: p for name, p in probabilities.items() if name != OTHER}
    else:
        alpha = {choice: 1.0} if sure and choice != OTHER else {}
    return Mixture(alpha, strategy, confidence, probabilities)


def _asked(library: ExpertLibrary, strategy: str) -> Mixture:
    """Who answers the first pass: the base model or the classifier expert."""
    return Mixture({library.classifier: 1.0}) if strategy == "classifier" and library.classifier else Mixture()


def _written(
    library: ExpertLibrary, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], strategy: str, size: int
) -> list[list[float]]:
    """Probabilities per prompt of the kind that the model writes: 1 for it; all alike where it writes none."""
    kinds = _kinds(library)
    names, rows = list(kinds), []
    settings = GenerationConfig(
        max_new_tokens=LABEL_TOKENS, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )  # not the model's own: the first pass neither samples nor searches beams
    for start in range(0, len(prompts), size):
        questions = [_question(tokenizer, prompt) for prompt in prompts[start : start + size]]
        inputs = _tokens(library, tokenizer, [boxed_prompt(q, kinds) for q in questions], room=LABEL_TOKENS)
        with torch.no_grad(), library.activate(_asked(library, strategy)) as model:
            output = model.generate(**inputs, generation_config=settings)
        length = inputs["input_ids"].shape[1]
        for text in tokenizer.batch_decode(output[:, length:], skip_special_tokens=True):
            kind = read_boxed(text, names)
            rows.append([1 / len(names) if kind is None else float(name == kind) for name in names])
    return rows


def boxed_prompt(question: str, kinds: Mapping[str, str]) -> list[dict[str, str]]:
    r"""The adaptation prompt of the paper (arXiv 2501.06252, appendix): the kinds, and `\boxed{}` for the answer."""
    named = "\n".join(f"- {name}: {what}" if what else f"- {name}" for name, what in kinds.items())
    text = (
        f"Analyze the given request and classify it into one of {len(kinds)} categories:\n{named}\n"
        "If it spans several, choose the dominant one. Answer with the category in \\boxed{} notation, for example "
        f"\\boxed{{{next(iter(kinds))}}}.\nRequest: {question}"
    )
    return [{"role": "user", "content": text}]


def read_boxed(text: str, names: Sequence[str]) -> str | None:
    r"""The kind in the first `\boxed{}` of a text, whatever its case; `None` if there is none, or an unknown one."""
    found = BOXED.search(text)
    return next((name for name in names if found and name.casefold() == found.group(1).strip().casefold()), None)


def _known_kinds(library: ExpertLibrary, prompts: Sequence[Prompt], kinds: Sequence[str]) -> list[str]:
    names = [*library.descriptions, OTHER]
    if not prompts or len(prompts) != len(kinds):
        raise ValueError(
            f"Fitting needs prompts with one kind each; got {len(prompts)} prompts and {len(kinds)} kinds."
        )
    if unknown := sorted(set(kinds) - set(names)):
        raise ValueError(no_expert(unknown[0], names))
    return names


def _question(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The text that is to be classified: the last user message, bounded."""
    if not isinstance(prompt, str):
        users = [message for message in prompt if message.get("role") == "user"] or list(prompt)
        content = users[-1]["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content if part.get("text")]
        prompt = " ".join(texts)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    return prompt if len(ids) <= QUESTION_TOKENS else tokenizer.decode(ids[:QUESTION_TOKENS], skip_special_tokens=True)
