# SPDX-License-Identifier: Apache-2.0
"""
The first pass of Transformer² (arXiv 2501.06252, section 3.3): a prompt, or a few examples -> `Mixture`.

`dispatch` asks "which kind of request is this": the base model, a classifier expert, or a linear probe on hidden
states. `few_shot` searches mixture weights on solved examples and checks them on examples that the search has not
seen. All leave the model as it was.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .cem import CrossEntropy
from .evaluation import choice_logps, prompt_text
from .evaluator import Evaluator, Example, Judge, LocalEvaluator, Weights, blocks_of, svf_layers, table_of
from .expert import OTHER, Expert, Mixture
from .library import ExpertLibrary
from .probe import Probe
from .probe import temperature as temperature_of
from .search import Ascent, CovarianceAdaptation, Found, Score, Searcher, maximise
from .tasks import Task, dispatch_prompt

logger = logging.getLogger(__name__)
Prompt = str | list[dict[str, Any]]
STRATEGIES = ("prompt", "classifier", "probe")
READINGS = ("likelihood", "generate")
FALLBACKS = ("base", "mix")
METHODS = ("cem", "cma", "gradient")
ANYTHING_ELSE = "anything else"  # what the prompt says of "other"
QUESTION_TOKENS = 256  # of the request that the first pass reads: it is bounded
LABEL_TOKENS = 48  # of the answer that `read="generate"` waits for
BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*['\"]?([^{}'\"]*?)['\"]?\s*\}")
FEWEST = 4  # examples from which on some are held out by default


# --- dispatch: prompts -> mixtures


def dispatch(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    strategy: str = "prompt",
    threshold: float = 0.0,
    calibrate: bool | None = None,
    batch_size: int = 16,
    read: str = "likelihood",
    temperature: float = 1.0,
    fallback: str = "base",
    soft: bool = False,
    probe: Probe | None = None,
) -> list[Mixture]:
    """
    Choose one expert, or the base model, for each prompt by the likelihood of its name.

    Args:
        library ([`~library.ExpertLibrary`]):
            The experts; their names and descriptions stand in the question that the model is asked.
        tokenizer (`PreTrainedTokenizerBase`):
            Of the base model.
        prompts (`Sequence[str | list[dict]]`):
            Texts or chats. Of a chat the last user message is read, of either the first 256 tokens.
        strategy (`str`):
            `"prompt"` asks the base model, `"classifier"` the library's classifier expert, `"probe"` a linear probe.
        threshold (`float`):
            Below this confidence `fallback` decides.
        calibrate (`bool`, *optional*):
            Divide the likelihoods by those of an empty request (contextual calibration): small models have a favourite
            answer. Default: for `"prompt"` only, the others are trained.
        batch_size (`int`):
            Prompts per forward.
        read (`str`):
            `"likelihood"` scores the names; `"generate"` is the paper's form: the model writes `\\boxed{name}`,
            greedily and within 48 tokens. What cannot be read is `"other"` with confidence 0.
        temperature (`float`):
            Divides the scores before the softmax, see [`fit_temperature`].
        fallback (`str`):
            What a decision below the threshold becomes: `"base"`, or `"mix"`, all experts by their probabilities.
        soft (`bool`):
            Use the probabilities as weights in every decision; that of `"other"` is the base model's share.
        probe ([`~probe.Probe`], *optional*):
            For `strategy="probe"`, see [`fit_probe`].

    Returns:
        `list[Mixture]` with confidence and probabilities; one-hot or empty unless they are mixed. The same for the
        same input.

    Raises:
        `ValueError`: for another strategy, reading or fallback, `"classifier"` without a classifier, `"probe"`
            without a probe of these experts, a temperature that is not positive, or a prompt over the context.
    """
    check_strategy(library, strategy, probe)
    for given, known, what in ((read, READINGS, "reading"), (fallback, FALLBACKS, "fallback")):
        if given not in known:
            raise ValueError(f"There is no {what} {given!r}: choose {' or '.join(map(repr, known))}.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"The temperature must be a positive number, got {temperature!r}.")
    names = [*library.descriptions, OTHER]
    if read == "generate":
        if strategy == "probe":
            raise ValueError('A probe writes no answer: read="generate" goes with "prompt" or "classifier".')
        rows = _written(library, tokenizer, prompts, strategy, batch_size)
    else:
        scores = kind_scores(library, tokenizer, prompts, strategy, calibrate, batch_size, probe)
        rows = (scores / temperature).softmax(-1).tolist()
    mixtures = [_decide(dict(zip(names, row, strict=True)), strategy, threshold, fallback, soft) for row in rows]
    for mixture in mixtures:
        logger.debug(f"dispatch by {strategy}: {mixture.record()}")
    return mixtures


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
    calibrate: bool | None = None,
    batch_size: int = 16,
    probe: Probe | None = None,
) -> Tensor:
    """
    Score each kind for each prompt; arguments as in [`dispatch`].

    Returns:
        `torch.Tensor` of shape `(prompts, experts + 1)`, the experts by name and `"other"` last. Its softmax are
        probabilities; `-inf` for a kind that the probe was not fitted to.
    """
    check_strategy(library, strategy, probe)
    calibrate = strategy == "prompt" if calibrate is None else calibrate
    kinds = {**library.descriptions, OTHER: ANYTHING_ELSE}
    names, parts = list(kinds), [torch.zeros(0, len(kinds))]
    if probe is not None and strategy == "probe":
        scores = torch.full((len(prompts), len(names)), -math.inf)
        if prompts:
            seen = features(library, tokenizer, prompts, probe.provenance["kinds_listed"], batch_size)
            scores[:, [names.index(label) for label in probe.labels]] = probe.scores(seen)
        return scores
    for start in range(0, len(prompts), batch_size):
        questions = [_question(tokenizer, prompt) for prompt in prompts[start : start + batch_size]]
        rows = [{"prompt": dispatch_prompt(question, kinds), "choices": names} for question in (*questions, "")]
        with torch.no_grad(), library.activate(_asked(library, strategy)) as model:
            logps = choice_logps(model, tokenizer, rows)
        parts.append((logps[:-1] - logps[-1] if calibrate else logps[:-1]).cpu())
    return torch.cat(parts)


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
            Of [`kind_scores`]: `strategy`, `calibrate`, `batch_size`, `probe`.

    Returns:
        `float` between 0.01 and 100; above 1 where the first pass is surer than it is right.

    Raises:
        `ValueError`: without prompts, if there is not one kind for each, or one is no expert.
    """
    names = _known_kinds(library, prompts, kinds)
    scores = kind_scores(library, tokenizer, prompts, **settings)
    return temperature_of(scores, torch.tensor([names.index(kind) for kind in kinds]))


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
            `"logistic"` or `"centroid"`, see [`~probe.Probe.fit`].

    Returns:
        [`~probe.Probe`], to be passed as `probe=` or saved.

    Raises:
        `ValueError`: as in [`fit_temperature`] and [`~probe.Probe.fit`].
    """
    _known_kinds(library, prompts, kinds)
    listed = {**library.descriptions, OTHER: ANYTHING_ELSE}
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
    texts = [prompt_text(tokenizer, prompt) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    length = inputs.input_ids.shape[1]
    limit = getattr(library.model.config.get_text_config(), "max_position_embeddings", None)
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
    kinds = {**library.descriptions, OTHER: ANYTHING_ELSE}
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
        raise ValueError(f"There is no expert {unknown[0]!r}; the kinds are {', '.join(names)}.")
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


# --- few-shot: solved examples -> one mixture


def few_shot(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    task: Task | None = None,
    method: str = "cem",
    population: int = 32,
    iterations: int = 50,
    elites: float = 0.2,
    low: float = 0.0,
    high: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    normalize: bool = False,
    per_layer: bool = False,
    holdout: float | Sequence[Example] = 0.25,
    state: str | PathLike[str] | None = None,
    max_tokens: int | None = None,
    max_seconds: float | None = None,
    name: str | None = None,
    evaluator: Evaluator | None = None,
    **generation: Any,
) -> Mixture:
    """
    Search mixture weights on a few solved examples, and check them on examples that the search has not seen.

    The first population holds the base model and each single expert. The result has to beat the base and the best of
    these on the held-out examples; if it does not, the better of the two is returned, with a warning in the log and in
    `provenance["held_out"]["fell_back"]`.

    Args:
        library ([`~library.ExpertLibrary`]):
            The experts.
        tokenizer (`PreTrainedTokenizerBase`):
            Of the base model.
        examples (`Sequence[Mapping]`):
            All of one form. `{"prompt", "choices", "label"}`: scored by the share of right choices, ties by the
            log-probability of the right one. `{"prompt", "answer"}` with a `task`: by the task's check of a greedy
            completion, ties by the log-likelihood of the answer. Without a task: by the latter alone. Where all
            candidates answer equally many right (none, or all), the tie-break alone decides, and the log says so.
        task ([`~tasks.Task`], *optional*):
            Checks completions; not asked about choices.
        method (`str`):
            `"cem"`, the cross-entropy method of the paper; `"cma"`, CMA-ES (extra `search`); `"gradient"`, Adam on the
            weights through the log-likelihood of the answers, from the mean, the base and each expert at once.
        population, iterations, elites, seed:
            Of the search, see [`~cem.CrossEntropy`]; the defaults are the paper's code's. A population has room for
            the base, each expert and their mean. The gradient has a population of its own.
        low, high (`float`):
            Range of a weight.
        batch_size (`int`):
            Rows per forward; one forward scores several candidates, each row under its own mixture.
        normalize (`bool`):
            Divide the weights by their sum. By default what is left of 1 belongs to the base model.
        per_layer (`bool`):
            One weight per expert and block of the model instead of one per expert. The mixed z-vector becomes an
            expert of the library under `name`, and the mixture returned is that expert alone; the weights are in
            `provenance["layers"]`.
        holdout (`float` or `Sequence[Mapping]`):
            The share of the examples that the search does not see, drawn by the seed; examples of the same form; or 0
            for no check. Of fewer than 4 examples none is held out.
        state (`str` or path, *optional*):
            File with the scores so far. If the search is interrupted, the same call goes on from it.
        max_tokens, max_seconds (*optional*):
            End of the search, see [`~search.maximise`]; interrupted runs count.
        name (`str`, *optional*):
            What the mixture is called; kept in `provenance`. Needed for `per_layer`.
        evaluator ([`~evaluator.Evaluator`], *optional*):
            Where populations are scored; default this process.
        generation:
            Arguments of `generate`, only where completions are checked.

    Returns:
        [`~expert.Mixture`] with settings, course and check of the search in `provenance`.

    Raises:
        `ValueError`: if there are no examples, one has neither choices with a label nor an answer or another form than
            the first, one does not fit the context, the method is unknown, the population is too small, or the state
            file is of another search.
        `TypeError`: for arguments of `generate` where nothing is generated.
        `ImportError`: for `"cma"` without its library.
    """
    form = _form(examples)
    if per_layer and (not name or name in library.names):
        raise ValueError(
            f"Weights per layer make an expert of the library: give it a name=... that no expert has, got {name!r}."
        )
    task = task if form == "answer" else None
    if generation and task is None:
        raise TypeError(f"few_shot does not know {', '.join(generation)}: these examples need no generation.")
    weights = Weights(tuple(library.names), blocks_of(library.model) if per_layer else (), normalize)
    seen, unseen = _split(examples, holdout, seed, form)
    evaluate = evaluator or LocalEvaluator()

    def judge_of(rows: Sequence[Example], gradients: bool = False) -> Callable[[np.ndarray], Any]:
        judge = Judge(
            library, tokenizer, weights, rows, task=task, generation=generation, batch_size=batch_size,
            gradients=gradients, seed=seed,
        )  # fmt: skip
        return lambda members: evaluate(judge, members)

    settings: dict[str, Any] = {"method": method, "population": population, "elites": elites}
    settings |= {"low": low, "high": high, "seed": seed}
    searcher = _searcher(weights, **settings)
    settings |= {"normalize": normalize, "per_layer": per_layer}
    depends = {**settings, "task": task and task.name, "generation": repr(sorted(generation.items()))}
    depends |= {"examples": _digest(seen), "experts": _digest_of_experts(library)}
    bar = tqdm(
        total=iterations, desc="Searching mixture weights", name="peft_svf.adaptation", disable=not evaluate.main
    )

    def progress(found: Found) -> None:
        bar.update()
        bar.set_postfix(best=f"{found.score[0]:.3f}", tokens=found.tokens)

    with bar:
        found = maximise(
            searcher, judge_of(seen, method == "gradient"), iterations,
            state=state, writes=evaluate.main, settings=depends,
            max_tokens=max_tokens, max_seconds=max_seconds, on_iteration=progress,
        )  # fmt: skip
    if form == "choices" or task is not None:
        _warn_of_ties(found)
    vector, score, check = _checked(weights, found, judge_of(seen), judge_of(unseen) if unseen else None)
    provenance = {
        **({"name": name} if name else {}), **settings, "iterations": len(found.history), "examples": len(seen),
        "held_out": {"examples": len(unseen), **check}, "score": list(score), "tokens": found.tokens,
        "stopped": found.stopped, "history": found.history,
    }  # fmt: skip
    logger.info(f"few-shot search: {found.tokens} tokens, {found.seconds:.0f} s, score {score}")
    if per_layer:
        return _as_expert(library, weights, vector, str(name), provenance)
    return weights.mixture(vector, provenance)


def _form(examples: Sequence[Example]) -> str:
    """The one form of the examples, `"choices"` or `"answer"`; a `ValueError` names the first that is none."""
    if not examples:
        raise ValueError(
            "Few-shot adaptation needs examples: dicts with 'prompt' and 'answer', or 'choices' and 'label'."
        )
    form = "choices" if "choices" in examples[0] else "answer"
    for i, example in enumerate(examples):
        if "prompt" not in example or not ({"choices", "label"} <= set(example) or "answer" in example):
            raise ValueError(
                f"Example {i} needs 'prompt' and 'answer', or 'choices' and 'label'; it has {list(example)}."
            )
        if form not in example or (form == "answer" and "choices" in example):
            raise ValueError(f"Example {i} has another form than example 0, which has {form!r}: adapt to one form.")
        if form == "choices" and not (
            len(example["choices"]) > 1 and example["label"] in range(len(example["choices"]))
        ):
            raise ValueError(
                f"Example {i} needs at least 2 choices and as label the place of the right one, from 0; it has "
                f"{len(example['choices'])} choices and label {example['label']!r}."
            )
        if form == "answer" and not (isinstance(example["answer"], str) and example["answer"]):
            raise ValueError(f"Example {i} needs an answer that is a text, got {example['answer']!r}.")
    return form


def _split(
    examples: Sequence[Example], holdout: float | Sequence[Example], seed: int, form: str
) -> tuple[list[Example], list[Example]]:
    """The examples that the search sees, and those that check its result."""
    if not isinstance(holdout, (int, float)):
        if holdout and _form(holdout) != form:
            raise ValueError(f"The held-out examples have another form than the others, which have {form!r}.")
        return list(examples), list(holdout)
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout is a share of the examples, at least 0 and less than 1, got {holdout}.")
    count = max(1, round(holdout * len(examples))) if holdout and len(examples) >= FEWEST else 0
    if holdout and not count:
        logger.info(f"{len(examples)} examples are too few to hold some out: the result is not checked.")
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    return [examples[i] for i in sorted(order[count:])], [examples[i] for i in sorted(order[:count])]


def _searcher(weights: Weights, *, method: str, population: int, elites: float, **settings: Any) -> Searcher:
    if method not in METHODS:
        raise ValueError(f"There is no search {method!r}: choose {', '.join(map(repr, METHODS))}.")
    count = len(weights.names)
    if method != "gradient" and population < count + 2:
        raise ValueError(
            f"A population of {population} is too small: with {count} experts it takes {count + 2} or more."
        )
    settings |= {"start": [1 / count] * weights.size, "starts": list(weights.corners().values())}
    if method == "cem":
        return CrossEntropy(weights.size, population=population, elites=elites, **settings)
    if method == "cma":
        return CovarianceAdaptation(weights.size, population=population, **settings)
    settings.pop("seed")  # it draws nothing
    return Ascent(weights.size, **settings)


def _checked(
    weights: Weights,
    found: Found,
    judge: Callable[[np.ndarray], Any],
    held_out: Callable[[np.ndarray], Any] | None,
) -> tuple[np.ndarray, Score, dict[str, Any]]:
    """The found vector if it beats base and best single expert on held-out examples, else the better of these two."""
    if held_out is None:
        return found.best, found.score, {"fell_back": None}
    corners = weights.corners()
    alone = dict(zip(corners, judge(np.asarray(list(corners.values()))).scores, strict=True))
    rivals = [OTHER, max(weights.names, key=lambda name: alone[name])]
    mine, *theirs = held_out(np.stack([found.best, *(np.asarray(corners[rival]) for rival in rivals)])).scores
    check: dict[str, Any] = {"found": list(mine), **{r: list(s) for r, s in zip(rivals, theirs, strict=True)}}
    # where the search has found a rival itself, that one cannot beat it
    beaten = [s >= mine and corners[r] != found.best.tolist() for r, s in zip(rivals, theirs, strict=True)]
    best = rivals[theirs.index(max(theirs))]
    if not any(beaten):
        return found.best, found.score, {**check, "fell_back": None}
    logger.warning(
        f"The mixture that the search found scores {mine} on held-out examples, no better than "
        f"{'the base model' if best == OTHER else f'the expert {best!r} alone'} with {max(theirs)}: that is returned "
        "instead. More examples may help."
    )
    return np.asarray(corners[best]), alone[best], {**check, "fell_back": best}


def _as_expert(
    library: ExpertLibrary, weights: Weights, vector: np.ndarray, name: str, provenance: dict[str, Any]
) -> Mixture:
    """Add the z-vector that weights per block stand for to the library, as an expert; a mixture of it alone."""
    by_block = weights.of(torch.tensor(vector, dtype=torch.float64)[None])[0]  # (blocks, experts)
    experts = [library.expert(each) for each in weights.names]
    ranks: list[Any] = [expert.config.get("rank") for expert in experts]
    rank = None if None in ranks else max(ranks)
    offsets: dict[str, Tensor] = {}
    for module, layer in svf_layers(library.model).items():
        if any(module in expert.offsets for expert in experts):
            table = table_of(experts, module, layer.size_of(rank))
            offsets[module] = (by_block[weights.place(module)].to(table) @ table).contiguous()
    prints = {m: found for expert in experts for m, found in (expert.config.get("fingerprint") or {}).items()}
    config = experts[0].config | {
        "description": f"mixed per layer from {', '.join(weights.names)}", "rank": rank, "fingerprint": prints or None,
        "target_modules": sorted(offsets), "exclude_modules": None, "layers_to_transform": None,
        "layers_pattern": None,
    }  # fmt: skip
    rows = [dict(zip(weights.names, row, strict=True)) for row in by_block.tolist()]
    provenance = {**provenance, "layers": dict(zip(weights.blocks, rows, strict=True))}
    library.add(Expert(name, offsets, config, provenance))
    return Mixture({name: 1.0}, "few-shot", 1.0, {}, provenance)


def _warn_of_ties(found: Found) -> None:
    shares = [(entry["best"][0], entry["mean_score"][0]) for entry in found.history]
    if all(math.isclose(best, mean, abs_tol=1e-9) for best, mean in shares):
        logger.info(
            f"Every candidate answers the same share of the examples right ({shares[0][0]:.2f}): log-likelihood alone "
            "decided. Examples of which some are answered right tell more."
        )


def _digest(rows: Sequence[Example]) -> str:
    return hashlib.sha256(json.dumps([dict(row) for row in rows], sort_keys=True, default=repr).encode()).hexdigest()


def _digest_of_experts(library: ExpertLibrary) -> dict[str, str]:
    """A hash of the offsets of each expert."""
    found = {}
    for name in library.names:
        content = hashlib.sha256()
        for module, offset in sorted(library.expert(name).offsets.items()):
            content.update(module.encode() + offset.float().cpu().numpy().tobytes())
        found[name] = content.hexdigest()
    return found
