# SPDX-License-Identifier: Apache-2.0
"""
The first pass of Transformer² (arXiv 2501.06252, section 3.3): a prompt, or a few examples -> `Mixture`.

`few_shot`, here, searches mixture weights on solved examples and checks them on examples that did not choose them.
`dispatch`, of `first_pass`, asks "which kind of request is this". Both leave the model as it was.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedTokenizerBase

from ..evaluation import context_of, row_lengths
from ..experts.expert import OTHER, Expert, Mixture
from ..experts.library import ExpertLibrary
from ..rows import has_image
from ..tasks import Task
from .cem import CrossEntropy
from .judge import (
    Evaluator,
    Example,
    Judge,
    LocalEvaluator,
    Weights,
    blocks_of,
    digest_of_experts,
)
from .search import Ascent, CovarianceAdaptation, Found, Judged, Score, Searcher, maximise

logger = logging.getLogger(__name__)
METHODS = ("cem", "cma", "gradient")
LEAVE_ONE_OUT: Literal["leave-one-out"] = "leave-one-out"
TEMPERATURE = 8.0  # of choices in a search


@torch.inference_mode(False)  # gradients are asked for, and an expert made here may be used with them
def few_shot(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
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
    temperature: float = TEMPERATURE,
    holdout: float | Literal["leave-one-out"] | Iterable[Example] = LEAVE_ONE_OUT,
    state: str | PathLike[str] | None = None,
    max_tokens: int | None = None,
    max_seconds: float | None = None,
    name: str | None = None,
    evaluator: Evaluator | None = None,
    **generation: Any,
) -> Mixture:
    """
    Search mixture weights on a few solved examples, and check them on examples that did not choose them.

    The first population holds the base model and each single expert. The result has to beat the base and the best of
    these in the check; if it does not, the better of the two is returned, with a warning in the log and in
    `provenance["held_out"]["fell_back"]`.

    Args:
        library ([`ExpertLibrary`]):
            The experts.
        tokenizer (`PreTrainedTokenizerBase`):
            Of the base model.
        examples (`Iterable[Mapping]`):
            All of one form. `{"prompt", "choices", "label"}`: scored by the share of right choices, ties by the
            log-probability of the right one at `temperature`. `{"prompt", "answer"}` with a `task`: by the task's
            check of a greedy completion, ties by the log-likelihood of the answer. Without a task: by the latter
            alone. Where all candidates answer equally many right (none, or all), the tie-break alone decides, and the
            log says so.
        task ([`Task`], *optional*):
            Checks completions; not asked about choices.
        method (`str`):
            `"cem"`, the cross-entropy method of the paper; `"cma"`, CMA-ES (extra `search`); `"gradient"`, Adam on the
            weights through the log-likelihood of the answers, from the mean, the base and each expert at once.
        population, iterations, elites, seed:
            Of the search, see [`CrossEntropy`]; the defaults are the paper's code's. A population has room for
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
        temperature (`float`):
            Divides the log-likelihoods of choices before they become probabilities. At 1 one sure mistake outweighs
            everything that a few examples say; at 8 choices gain more on SVAMP, and as little where there is little to
            gain (`benchmarks/adaptation.py`).
        holdout (`"leave-one-out"`, `float` or `Iterable[Mapping]`):
            What checks the result. `"leave-one-out"`: the search sees all examples; each is then answered by the
            candidate that is best on the others, and the mean of these scores is compared, as is that of the best
            single expert, chosen in the same way. It costs nothing, but the candidates themselves were drawn with all
            examples in view: with many weights (`per_layer`) it flatters. A share of the examples, drawn by the seed,
            or other examples of the same form, that the search does not see; or 0 for no check. A single example is
            not checked.
        state (`str` or path, *optional*):
            File with the scores so far. If the search is interrupted, the same call goes on from it.
        max_tokens, max_seconds (*optional*):
            End of the search, see [`maximise`]; interrupted runs count, and so does the check: it scores the
            result, the base and the best expert on held-out examples, which is reserved at the cost of the last
            population. The first population and the check are always scored.
        name (`str`, *optional*):
            Under which the mixture is added to the library, with `per_layer` the expert that it makes, so that
            requests may name it; kept in `provenance`. Needed for `per_layer`.
        evaluator ([`Evaluator`], *optional*):
            Where populations are scored; default this process.
        generation:
            Arguments of `generate`, only where completions are checked.

    Returns:
        [`Mixture`] with settings, course and check of the search in `provenance`.

    Raises:
        `ValueError`: if there are no examples, one has neither choices with a label nor an answer or another form than
            the first, an image, or does not fit the context, the method is unknown, the population is too small, the
            name is taken, or the state file is of another search.
        `TypeError`: for arguments of `generate` where nothing is generated.
        `ImportError`: for `"cma"` without its library.
    """
    examples = list(examples)
    if not isinstance(holdout, (str, int, float)):
        holdout = list(holdout)
    if per_layer and not name:
        raise ValueError("Weights per layer make an expert of the library: give it a name=... that no expert has.")
    if name:
        library.check_name(name)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    form = _form(examples)
    task = task if form == "answer" else None
    if generation and task is None:
        raise TypeError(f"few_shot does not know {', '.join(generation)}: these examples need no generation.")
    if not temperature > 0:
        raise ValueError(f"The temperature of choices is more than 0, got {temperature}.")
    weights = Weights(tuple(library.names), blocks_of(library.layers()) if per_layer else (), normalize)
    seen, unseen = _split(examples, holdout, seed, form)
    for what, rows in (("Example", examples), ("Held-out example", holdout if isinstance(holdout, list) else [])):
        _check_fit(library, tokenizer, rows, what)
    evaluate = evaluator or LocalEvaluator()

    def judge_of(rows: Sequence[Example], gradients: bool = False) -> Callable[[np.ndarray], Any]:
        judge = Judge(
            library, tokenizer, weights, rows, task=task, generation=generation, batch_size=batch_size,
            gradients=gradients, seed=seed, temperature=temperature,
        )  # fmt: skip
        return lambda members: evaluate(judge, members)

    settings: dict[str, Any] = {"method": method, "population": population, "elites": elites}
    settings |= {"low": low, "high": high, "seed": seed}
    searcher = _searcher(weights, **settings)
    settings |= {"normalize": normalize, "per_layer": per_layer}
    if form == "choices":
        settings["temperature"] = temperature
    depends = {**settings, "task": task and task.name, "generation": repr(sorted(generation.items()))}
    depends |= {"examples": _digest(seen), "experts": digest_of_experts(library)}
    bar = tqdm(
        total=iterations, desc="Searching mixture weights", name="peft_svf.adaptation", disable=not evaluate.main
    )

    def progress(found: Found) -> None:
        bar.update()
        checked = form == "choices" or task is not None  # else the likelihood is all there is
        bar.set_postfix(best=f"{found.score[0 if checked else 1]:.3f}", tokens=found.tokens)

    # the check: base and experts where the range keeps them out of the search, then three vectors on other examples
    corners = np.asarray(list(weights.corners().values()))
    reserve = 0.0 if holdout == 0 else sum(map(any, corners != np.clip(corners, low, high)))
    reserve += 3 * len(unseen) / len(seen)
    with bar:
        found = maximise(
            searcher, judge_of(seen, method == "gradient"), iterations,
            state=state, writes=evaluate.main, settings=depends,
            max_tokens=max_tokens, max_seconds=max_seconds, reserve=reserve, on_iteration=progress,
        )  # fmt: skip
    if form == "choices" or task is not None:
        _warn_of_ties(found)
    others = judge_of(unseen) if unseen else None
    vector, score, check = check_choice(weights, found, judge_of(seen), others, holdout == LEAVE_ONE_OUT)
    provenance = {
        **({"name": name} if name else {}), **settings, "iterations": len(found.history), "examples": len(seen),
        "held_out": check, "score": list(score), "tokens": found.tokens, "stopped": found.stopped,
        "history": found.history,
    }  # fmt: skip
    logger.info(f"few-shot search: {found.tokens} tokens, {found.seconds:.0f} s, score {score}")
    if per_layer:
        return _as_expert(library, weights, vector, str(name), provenance)
    mixture = weights.mixture(vector, provenance)
    if name:
        try:
            library.add_mixture(name, mixture)
        except ValueError as error:  # the library changed while the search ran: its result is not lost
            logger.warning(f"The mixture is returned, but not kept in the library as {name!r}: {error}")
    return mixture


def _form(examples: Sequence[Example], what: str = "Example") -> str:
    """The one form of the examples, `"choices"` or `"answer"`; a `ValueError` names the first that is none."""
    if not examples:
        raise ValueError(
            "Few-shot adaptation needs examples: dicts with 'prompt' and 'answer', or 'choices' and 'label'."
        )
    form = "choices" if "choices" in examples[0] else "answer"
    for i, example in enumerate(examples):
        if "prompt" not in example or not ({"choices", "label"} <= set(example) or "answer" in example):
            raise ValueError(
                f"{what} {i} needs 'prompt' and 'answer', or 'choices' and 'label'; it has {list(example)}."
            )
        if not example["prompt"]:
            raise ValueError(f"{what} {i} has an empty prompt: there is nothing an answer could follow.")
        if has_image(example):
            raise ValueError(f"{what} {i} has an image: log-likelihoods are those of texts.")
        if form not in example or (form == "answer" and "choices" in example):
            raise ValueError(f"{what} {i} has another form than example 0, which has {form!r}: adapt to one form.")
        if form == "choices" and (
            not isinstance(example["choices"], (list, tuple))
            or not all(isinstance(text, str) and text for text in example["choices"])
        ):
            raise ValueError(f"{what} {i} needs a list of choices that are texts, got {example['choices']!r}.")
        if form == "choices" and not (
            len(example["choices"]) > 1 and example["label"] in range(len(example["choices"]))
        ):
            raise ValueError(
                f"{what} {i} needs at least 2 choices and as label the place of the right one, from 0; it has "
                f"{len(example['choices'])} choices and label {example['label']!r}."
            )
        if form == "answer" and not (isinstance(example["answer"], str) and example["answer"]):
            raise ValueError(f"{what} {i} needs an answer that is a text, got {example['answer']!r}.")
    return form


def _check_fit(
    library: ExpertLibrary, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], what: str
) -> None:
    """Refuse an example of which a prompt with its longest answer is more than the model reads."""
    rows = [example if "choices" in example else {**example, "choices": [example["answer"]]} for example in examples]
    limit = context_of(library.model)
    for i, tokens in enumerate(row_lengths(tokenizer, rows)):
        if limit is not None and tokens > limit:
            raise ValueError(f"{what} {i} has {tokens} tokens, but the model's context is {limit}: shorten it.")


def _split(
    examples: Sequence[Example], holdout: float | str | list[Example], seed: int, form: str
) -> tuple[list[Example], list[Example]]:
    """The examples that the search sees, and others that check its result."""
    if holdout == LEAVE_ONE_OUT:
        return list(examples), []
    if isinstance(holdout, str) or (isinstance(holdout, (int, float)) and not 0 <= holdout < 1):
        raise ValueError(
            f"holdout is {LEAVE_ONE_OUT!r}, a share of the examples of at least 0 and less than 1, or other examples; "
            f"got {holdout!r}."
        )
    if not isinstance(holdout, (int, float)):
        if holdout and _form(holdout, "Held-out example") != form:
            raise ValueError(f"The held-out examples have another form than the others, which have {form!r}.")
        return list(examples), holdout
    most = len(examples) - 1  # one is left to search on
    count = min(max(1, round(holdout * len(examples))), most) if holdout else 0
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


def check_choice(
    weights: Weights,
    found: Found,
    judge: Callable[[np.ndarray], Judged],
    unseen: Callable[[np.ndarray], Judged] | None,
    leave_one_out: bool,
) -> tuple[np.ndarray, Score, dict[str, Any]]:
    """
    Keep what a search found if it beats the base and the best single expert on examples that did not choose it.

    Args:
        weights, found ([`Weights`], [`Found`]):
            How vectors are read, and the end of a search, to which the cost of the check is added.
        judge (`Callable`):
            Scores vectors on the examples of the search: the base and experts that it has not scored itself.
        unseen (`Callable`, *optional*):
            Scores them on other examples: then these are the check.
        leave_one_out (`bool`):
            Without others, whether each example is answered by the candidate that is best on the rest.

    Returns:
        The vector to use, its score on the examples of the search, and what the check found, as JSON values.
    """
    if unseen is None and not leave_one_out:
        return found.best, found.score, {"examples": 0, "fell_back": None}
    if found.each is None:
        raise ValueError(
            "A check needs the scores of single examples, which this evaluator does not give as `Judged.each`: let it "
            "give them, or search with holdout=0."
        )
    if unseen is None and found.each.shape[1] < 2:
        logger.info("A single example is not checked: no other could choose a candidate for it.")
        return found.best, found.score, {"examples": 0, "fell_back": None}

    def scored(by: Callable[[np.ndarray], Judged], vectors: Sequence[Sequence[float]]) -> Judged:
        judged = by(np.asarray(vectors))
        found.tokens += judged.tokens
        found.seconds += judged.seconds
        return judged

    corners = weights.corners()
    known = dict(zip(map(tuple, found.members.tolist()), found.each, strict=True))  # scores by example
    if missing := [corner for corner in corners.values() if tuple(corner) not in known]:
        judged = scored(judge, missing)
        assert judged.each is not None
        known |= zip(map(tuple, missing), judged.each, strict=True)
    each = np.stack([known[tuple(corner)] for corner in corners.values()])  # (base and experts, examples, entries)
    alone: dict[str, Score] = dict(zip(corners, map(tuple, each.mean(1).tolist()), strict=True))
    rivals = (OTHER, max(weights.names, key=lambda name: alone[name]))
    if unseen is not None:
        there = scored(unseen, [found.best.tolist(), *(corners[rival] for rival in rivals)])
        assert there.each is not None
        mine, *theirs = there.scores
        check: dict[str, Any] = {"examples": there.each.shape[1]}
    else:
        mine, theirs = _choosing(found.each), [alone[OTHER], _choosing(each[1:])]
        check = {"examples": found.each.shape[1], "by": LEAVE_ONE_OUT}
    return _decided(found, mine, dict(zip(rivals, theirs, strict=True)), corners, alone, check)


def _choosing(each: np.ndarray) -> Score:
    """The mean score of the candidate best on the other examples; `each`: `(candidates, examples, entries)`."""
    count = each.shape[1]
    rest = [np.delete(each, i, 1).mean(1) for i in range(count)]
    chosen = [max(range(len(each)), key=lambda row: tuple(means[row])) for means in rest]  # the first of equal ones
    return tuple(float(x) for x in each[chosen, range(count)].mean(0))


def _decided(
    found: Found,
    mine: Score,
    theirs: Mapping[str, Score],
    corners: Mapping[str, list[float]],
    alone: Mapping[str, Score],
    check: dict[str, Any],
) -> tuple[np.ndarray, Score, dict[str, Any]]:
    """The found vector if its score in the check beats those of base and best expert, else the better of these two."""
    check |= {"found": list(mine), "rivals": {rival: list(score) for rival, score in theirs.items()}}
    best = max(theirs, key=lambda rival: theirs[rival])  # of equal ones the base
    # where the search has found a rival itself, that one cannot beat it
    beaten = any(score >= mine and corners[rival] != found.best.tolist() for rival, score in theirs.items())
    if not beaten or corners[best] == found.best.tolist():
        return found.best, found.score, {**check, "fell_back": None}
    logger.warning(
        f"The mixture that the search found scores {mine} on examples that did not choose it, no better than "
        f"{'the base model' if best == OTHER else f'the expert {best!r} alone'} with {theirs[best]}: that is returned "
        "instead. More examples may help."
    )
    return np.asarray(corners[best]), alone[best], {**check, "fell_back": best}


def _as_expert(
    library: ExpertLibrary, weights: Weights, vector: np.ndarray, name: str, provenance: dict[str, Any]
) -> Mixture:
    """Add the z-vector that weights per block stand for to the library, as an expert; a mixture of it alone."""
    by_block = weights.of(torch.tensor(vector, dtype=torch.float64)[None])[0]  # (blocks, experts)
    configs = [library.expert(each).config for each in weights.names]
    ranks: list[Any] = [config.get("rank") for config in configs]
    rank = None if None in ranks else max(ranks)
    mixed = library.mix(weights.names, lambda module: by_block[None, weights.place(module)])  # (1, k) each
    layers = library.layers()
    offsets = {
        module: offset[0, : layers[module].size_of(rank)].float().cpu().contiguous()
        for module, offset in mixed.items()
        if offset.numel()
    }
    prints = {m: found for config in configs for m, found in (config.get("fingerprint") or {}).items()}
    config = configs[0] | {
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
