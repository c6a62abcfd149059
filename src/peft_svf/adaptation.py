# SPDX-License-Identifier: Apache-2.0
"""
The first pass of Transformer² (arXiv 2501.06252, section 3.3): a prompt, or a few examples -> `Mixture`.

`few_shot`, here, searches mixture weights on solved examples and checks them on examples that the search has not seen.
`dispatch`, of `first_pass`, asks "which kind of request is this". Both leave the model as it was.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .cem import CrossEntropy
from .evaluator import (
    Evaluator,
    Example,
    Judge,
    LocalEvaluator,
    Weights,
    blocks_of,
    digest_of_experts,
    svf_layers,
    table_of,
)
from .expert import OTHER, Expert, Mixture
from .first_pass import (
    ANYTHING_ELSE,
    FALLBACKS,
    LABEL_TOKENS,
    QUESTION_TOKENS,
    READINGS,
    STRATEGIES,
    Prompt,
    boxed_prompt,
    check_strategy,
    dispatch,
    features,
    fit_calibration,
    fit_probe,
    fit_temperature,
    kind_scores,
    read_boxed,
)
from .library import ExpertLibrary
from .search import Ascent, CovarianceAdaptation, Found, Score, Searcher, maximise
from .tasks import Task

__all__ = [
    "ANYTHING_ELSE", "FALLBACKS", "LABEL_TOKENS", "METHODS", "QUESTION_TOKENS", "READINGS", "STRATEGIES", "Prompt",
    "boxed_prompt", "check_strategy", "dispatch", "features", "few_shot", "fit_calibration", "fit_probe",
    "fit_temperature", "kind_scores", "read_boxed",
]  # fmt: skip

logger = logging.getLogger(__name__)
METHODS = ("cem", "cma", "gradient")
FEWEST = 4  # examples from which on some are held out by default


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
    depends |= {"examples": _digest(seen), "experts": digest_of_experts(library)}
    bar = tqdm(
        total=iterations, desc="Searching mixture weights", name="peft_svf.adaptation", disable=not evaluate.main
    )

    def progress(found: Found) -> None:
        bar.update()
        checked = form == "choices" or task is not None  # else the likelihood is all there is
        bar.set_postfix(best=f"{found.score[0 if checked else 1]:.3f}", tokens=found.tokens)

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
