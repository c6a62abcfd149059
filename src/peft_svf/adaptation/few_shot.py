# SPDX-License-Identifier: Apache-2.0
"""
A few solved examples -> the mixture of experts that answers them best (arXiv 2501.06252, section 3.3).

A search over mixture weights, whose result is checked on examples that didn't choose it. The model is left as it was.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedTokenizerBase

from ..evaluation import context_of, row_lengths
from ..experts.expert import OTHER, Expert, Mixture
from ..experts.key import RoutingKey, key_ids, make_key
from ..experts.library import ExpertLibrary
from ..rows import Reader, Row, check
from ..tasks import Task
from ..tuner.targets import block_of
from .first_pass import FirstPass, decide
from .judge import Evaluator, Judge, Weights, answer_row, digest_of_experts
from .router import key_scores, keys_of
from .search import Found, Judged, Score, Search, maximise

logger = logging.getLogger(__name__)
LEAVE_ONE_OUT: Literal["leave-one-out"] = "leave-one-out"
DEFAULT = Search()
FARTHEST = -20.0  # log-probability; one example far from an expert doesn't outweigh all others
Scorer = Callable[[np.ndarray], Judged]


@torch.inference_mode(False)  # gradients are needed, and an expert made here may be used with them
def few_shot(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Row],
    search: Search = DEFAULT,
    *,
    task: Task | None = None,
    holdout: Literal["leave-one-out"] | Iterable[Row] = LEAVE_ONE_OUT,
    name: str | None = None,
    key: bool = False,
    state: str | PathLike[str] | None = None,
    evaluator: Evaluator | None = None,
    batch_size: int = 32,
    **generation: Any,
) -> Mixture:
    """
    Search mixture weights on a few solved examples, and check them on examples that didn't choose them.

    The first population holds the base model and each single expert. If the result doesn't beat both the base and the
    best expert in the check, the better of the two is returned, with a warning and `provenance["held_out"]`.

    Args:
        examples (`Iterable[Mapping]`):
            All of one form. `{"prompt", "choices", "label"}`: scored by the share of right choices, ties by their
            log-probability. `{"prompt", "answer"}` with a `task`: by its score of a greedy completion, ties by the
            log-likelihood of the answer. Without a task: by the latter alone.
        holdout (`"leave-one-out"` or `Iterable[Mapping]`):
            Each example is answered by the candidate that is best on the others: free, but the candidates were drawn
            with all examples in view, which flatters a search over many weights. Or other examples; `[]` for no check.
        name (`str`, *optional*):
            Name of the mixture in the library. `search.per_layer` needs it: the mixed z-vector becomes an expert of
            this name, and the mixture is that expert alone.
        key (`bool`):
            Make a routing key of the examples for the first pass `"key"`. Needs a name, and keys of all experts.
        state (`str` or path, *optional*): File from which the same call goes on after an interruption.
        evaluator (`Callable`, *optional*): Scores populations, as [`RayEvaluator`] does; default this process.
        generation: Arguments of `generate` for completions.
    """
    with library.lock:
        seen = _checked(library, tokenizer, examples, "Example")
        unseen = [] if holdout == LEAVE_ONE_OUT else _checked(library, tokenizer, holdout, "Held-out example", seen)
        weights, choices = _weights(library, search, name), "choices" in seen[0]
        made = _key_of(library, tokenizer, seen, name) if key else None
        if generation and (choices or task is None):
            raise TypeError(f"few_shot has no argument {next(iter(generation))!r}: these examples generate nothing.")
        settings: Any = {"task": task, "generation": generation, "batch_size": batch_size}
        settings |= {"seed": search.seed, "temperature": search.temperature}

        def judge(rows: Sequence[Row], gradients: bool = False) -> Scorer:
            scores = Judge(library, tokenizer, weights, rows, gradients=gradients, **settings)
            return partial(evaluator, scores) if evaluator else scores

        if search.method == "key":
            mixture = _nearest(library, tokenizer, seen)
        else:
            facts = search.facts(choices)
            depends = {**facts, **_inputs(library, seen, None if choices else task, generation)}
            reserve = 3 * len(unseen) / len(seen)
            found = _searched(search, weights, judge(seen, search.method == "gradient"), depends, state, reserve)
            vector, score, held_out = found.best, found.score, {"examples": 0, "fell_back": None}
            if unseen or (holdout == LEAVE_ONE_OUT and len(seen) > 1):
                vector, score, held_out = check_choice(weights, found, judge(seen), judge(unseen) if unseen else None)
            facts |= {"tokens": found.tokens, "stopped": found.stopped, "iterations": len(found.history), "name": name}
            facts |= {"history": found.history, "examples": len(seen), "held_out": held_out, "score": list(score)}
            if search.per_layer:
                return _as_expert(library, weights, vector, str(name), facts, made)
            mixture = weights.mixture(vector, facts)
        if name:
            library.add_mixture(name, mixture, made)
        return mixture


def _key_of(library: ExpertLibrary, tokenizer: Reader, rows: Sequence[Row], name: str | None) -> RoutingKey:
    """Make a routing key of examples, of the kind that the library's experts have."""
    if not name:
        raise ValueError("A routing key belongs to a named mixture: pass name=... with key=True.")
    block, pooling = next(iter(keys_of(library).values())).how
    with library.activate(Mixture()) as model:
        return make_key(model, tokenizer, [row["prompt"] for row in rows], block=block, pooling=pooling)


def _checked(
    library: ExpertLibrary, tokenizer: Reader, examples: Iterable[Row], what: str, like: Sequence[Row] = ()
) -> list[Row]:
    """Return the examples; a `ValueError` if one is malformed, too long for the context, or of another form."""
    rows: list[Row] = []
    for i, row in enumerate(examples):
        check(row, f"{what} {i}", answered=True)
        rows.append({key: value for key, value in row.items() if value is not None})
    if len({"choices" in row for row in [*rows, *like]}) != 1:
        raise ValueError(f"{what}s must have one form, 'choices' with 'label' in all or 'answer' in all.")
    limit = context_of(library.model)
    for i, tokens in enumerate(row_lengths(tokenizer, [answer_row(row) for row in rows])):
        if limit is not None and tokens > limit:
            raise ValueError(f"{what} {i} has {tokens} tokens, but the model's context is {limit}: shorten it.")
    return rows


def _weights(library: ExpertLibrary, search: Search, name: str | None) -> Weights:
    """Return how vectors are read; a `ValueError` if the result can't have its name."""
    stacked = any(library.expert(expert).config.get("target_parameters") for expert in library.names)
    if search.per_layer and (stacked or not name):
        raise ValueError(
            "Weights per layer make an expert of the library: pass a name=... that no expert has, and no experts of "
            "stacked weights (target_parameters)."
        )
    if name:
        library.check_name(name)
    blocks = dict.fromkeys(map(block_of, library.layers())) if search.per_layer else ()
    return Weights(tuple(library.names), tuple(blocks), search.normalize)


def _nearest(library: ExpertLibrary, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Row]) -> Mixture:
    """Choose the expert, or the base, that the keys find likeliest for all examples together."""
    ids = key_ids(tokenizer, [row["prompt"] for row in examples])
    scores = key_scores(library, tokenizer, ids).log_softmax(-1).clamp(min=FARTHEST).mean(0, keepdim=True)
    facts = {"method": "key", "examples": len(examples), "tokens": sum(map(len, ids)), "score": [float(scores.max())]}
    facts |= {"held_out": {"examples": 0, "fell_back": None}, "stopped": "", "iterations": 0, "history": []}
    (mixture,) = decide(library, scores, FirstPass("key"))
    return replace(mixture, strategy="few-shot", provenance=facts)


def _searched(
    search: Search,
    weights: Weights,
    judge: Scorer,
    depends: Mapping[str, Any],
    state: str | PathLike[str] | None,
    reserve: float,
) -> Found:
    """Run the search from the mean, the base and each expert, with a progress bar."""
    corners = np.asarray(list(weights.corners().values()))
    starts = np.concatenate([np.full((1, weights.size), 1 / len(weights.names)), corners])
    # The check scores the base and the experts itself if the range keeps them out of the search.
    reserve += sum(map(any, corners != np.clip(corners, search.low, search.high)))
    with tqdm(total=search.iterations, desc="Searching mixture weights", name="peft_svf.adaptation") as bar:

        def progress(found: Found) -> None:
            bar.update()
            bar.set_postfix(best=" ".join(f"{entry:.3f}" for entry in found.score), tokens=found.tokens)

        found = maximise(search, starts, judge, state=state, settings=depends, reserve=reserve, on_iteration=progress)
    logger.info(f"few-shot search: {found.tokens} tokens, {found.seconds:.0f} s, score {found.score}")
    return found


def check_choice(
    weights: Weights, found: Found, judge: Scorer, unseen: Scorer | None = None
) -> tuple[np.ndarray, Score, dict[str, Any]]:
    """
    Keep what a search found if it beats the base and the best single expert on examples that didn't choose it.

    `judge` scores vectors on the examples of the search, `unseen` on others. Without `unseen` each example is answered
    by the candidate that is best on the others. The cost of the check is added to `found`.

    Returns:
        The vector to use, its score on the examples of the search, and the check as JSON values.
    """

    def scored(by: Scorer, vectors: Sequence[Sequence[float]]) -> Judged:
        judged = by(np.asarray(vectors))
        found.tokens += judged.tokens
        found.seconds += judged.seconds
        return judged

    corners = weights.corners()
    known = dict(zip(map(tuple, found.members.tolist()), found.by_example, strict=True))
    if missing := [corner for corner in corners.values() if tuple(corner) not in known]:
        known |= zip(map(tuple, missing), scored(judge, missing).by_example, strict=True)
    by_example = np.stack([known[tuple(corner)] for corner in corners.values()])  # (base and experts, examples, 2)
    alone = dict(zip(corners, Judged(by_example).scores, strict=True))
    rivals = (OTHER, max(weights.names, key=lambda name: alone[name]))
    if unseen is not None:
        judged = scored(unseen, [found.best.tolist(), *(corners[rival] for rival in rivals)])
        mine, *others = judged.scores
        held_out: dict[str, Any] = {"examples": judged.by_example.shape[1]}
    else:
        mine, others = left_out(found.by_example), [alone[OTHER], left_out(by_example[1:])]
        held_out = {"examples": found.by_example.shape[1], "by": LEAVE_ONE_OUT}
    theirs = dict(zip(rivals, others, strict=True))
    best = max(theirs, key=lambda rival: theirs[rival])  # (the base, of equals)
    # A rival that the search has found itself can't beat it.
    beaten = any(score >= mine and corners[rival] != found.best.tolist() for rival, score in theirs.items())
    fell_back = best if beaten and corners[best] != found.best.tolist() else None
    held_out |= {"found": list(mine), "rivals": {rival: list(score) for rival, score in theirs.items()}}
    held_out["fell_back"] = fell_back
    if fell_back is None:
        return found.best, found.score, held_out
    logger.warning(
        f"The mixture that the search found scores {mine} on examples that didn't choose it, no better than "
        f"{'the base model' if best == OTHER else f'the expert {best!r}'} with {theirs[best]}, which is returned "
        "instead. More examples may help."
    )
    return np.asarray(corners[best]), alone[best], held_out


def left_out(by_example: np.ndarray) -> Score:
    """Score each example by the candidate best on the others; `by_example`: `(candidates, examples, entries)`."""
    count = by_example.shape[1]
    rest = [np.delete(by_example, i, 1).mean(1) for i in range(count)]
    chosen = [max(range(len(by_example)), key=lambda row: tuple(means[row])) for means in rest]  # (first of equals)
    return tuple(float(x) for x in by_example[chosen, range(count)].mean(0))


def _as_expert(
    library: ExpertLibrary,
    weights: Weights,
    vector: np.ndarray,
    name: str,
    provenance: dict[str, Any],
    key: RoutingKey | None,
) -> Mixture:
    """Add the z-vector that weights per layer make to the library, as an expert; return a mixture of it alone."""
    by_block = weights.alpha(torch.tensor(vector, dtype=torch.float64)[None])[0]  # (blocks, experts)
    configs = [library.expert(expert).config for expert in weights.names]
    ranks: list[Any] = [config.get("rank") for config in configs]
    rank, layers = None if None in ranks else max(ranks), library.layers()
    mixed = library.mix(weights.names, lambda module: by_block[None, weights.block(module)])  # (1, k) each
    offsets = {
        module: offset[0, : layers[module].size_of(rank)].float().cpu().contiguous()
        for module, offset in mixed.items()
        if offset.numel()
    }
    fingerprint = {module: entry for c in configs for module, entry in (c.get("fingerprint") or {}).items()}
    unset = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    targets = {"rank": rank, "target_modules": sorted(offsets), "fingerprint": fingerprint or None}
    config = configs[0] | unset | targets | {"description": f"mixed per layer from {', '.join(weights.names)}"}
    rows = [dict(zip(weights.names, row, strict=True)) for row in by_block.tolist()]
    provenance = {**provenance, "layers": dict(zip(weights.blocks, rows, strict=True))}
    library.add(Expert(name, offsets, config, provenance, key))
    return Mixture({name: 1.0}, "few-shot", 1.0, {}, provenance)


def _inputs(
    library: ExpertLibrary, rows: Sequence[Row], task: Task | None, generation: Mapping[str, Any]
) -> dict[str, Any]:
    """Return examples, experts and generation in JSON values: a search with others isn't the same search."""
    content = json.dumps([dict(row) for row in rows], sort_keys=True, default=repr).encode()
    return {
        "task": task and task.name,
        "generation": repr(sorted(generation.items())),
        "examples": hashlib.sha256(content).hexdigest(),
        "experts": digest_of_experts(library),
    }
