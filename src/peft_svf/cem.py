# SPDX-License-Identifier: Apache-2.0
"""
Cross-entropy method over a vector in a box: scores in, the best vector out. It knows no model.

The settings default to those of the reference code of arXiv 2501.06252 (few-shot adaptation): population 32, elites
0.2 of it, start at the middle of the simplex `1 / n` with half the range as spread, the best member kept and returned.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

Score = tuple[float, ...]  # compared entry by entry: later ones break ties of earlier ones


@dataclass
class Search:
    """
    The state of a search, as [`cross_entropy_method`] shows it after each population and returns it.

    Args:
        mean, std (`np.ndarray` of shape `(n,)`): Where the next population is drawn.
        best (`np.ndarray` of shape `(n,)`): The best vector so far.
        score (`tuple[float, ...]`): Its score.
        history (`list[dict]`): Per iteration the best and the mean score and the centre of the population.
    """

    mean: np.ndarray
    std: np.ndarray
    best: np.ndarray
    score: Score = ()
    history: list[dict] = field(default_factory=list)


def cross_entropy_method(
    evaluate: Callable[[np.ndarray], Sequence[Score]],
    size: int,
    *,
    population: int = 32,
    elites: float = 0.2,
    iterations: int = 50,
    low: float = 0.0,
    high: float = 1.0,
    min_std: float = 0.01,
    seed: int = 0,
    starts: Sequence[Sequence[float]] = (),
    on_iteration: Callable[[Search], bool | None] | None = None,
) -> Search:
    """
    Maximise a score over vectors in `[low, high]^size`.

    Args:
        evaluate (`Callable`):
            Scores a population `(members, size)`: one tuple per member, larger is better, NaN the worst.
        size (`int`):
            Length of the vector.
        population, elites, iterations (`int`, `float`, `int`):
            Members of a population, the share of it that shapes the next, and how many populations.
        low, high (`float`):
            Members are clamped to this range.
        min_std (`float`):
            Spread below which no direction falls.
        seed (`int`):
            Same seed and scores, same result.
        starts (`Sequence`):
            Vectors that are members of the first population, beside its mean.
        on_iteration (`Callable`, *optional*):
            Called after each population; `True` ends the search.

    Returns:
        [`Search`], whose `best` is the best member ever scored.

    Raises:
        `ValueError`: for settings that leave nothing to search with, or starts of another length.
    """
    keep = int(elites * population)
    if size < 1 or iterations < 1 or population < 2 or not 1 <= keep <= population:
        raise ValueError(
            f"A search needs at least 1 number, 1 iteration, 2 members and 1 elite; got size={size}, "
            f"iterations={iterations}, population={population}, elites={elites} (so {keep})."
        )
    if not low < high or min_std < 0:
        raise ValueError(f"A search needs low < high and min_std >= 0; got {low}, {high} and {min_std}.")
    if any(len(start) != size for start in starts):
        raise ValueError(f"The starts of a search over {size} numbers have lengths {[len(s) for s in starts]}.")
    if len(starts) >= population:
        raise ValueError(f"{len(starts)} starts leave no room in a population of {population}.")
    draws = np.random.default_rng(seed)
    first = np.clip(np.full(size, 1 / size), low, high)
    state = Search(mean=first, std=np.full(size, (high - low) / 2), best=first)
    for iteration in range(iterations):
        members = state.mean + state.std * draws.standard_normal((population, size))
        fixed = [state.best] if iteration else [state.mean, *map(np.asarray, starts)]
        members[: len(fixed)] = fixed
        members = np.clip(members, low, high)
        scores = [tuple(-np.inf if np.isnan(x) else float(x) for x in score) for score in evaluate(members)]
        order = sorted(range(population), key=lambda i: scores[i], reverse=True)
        if not state.score or scores[order[0]] > state.score:
            state.best, state.score = members[order[0]].copy(), scores[order[0]]
        elite = members[order[:keep]]
        state.mean = elite.mean(0)
        state.std = np.maximum(elite.std(0, ddof=1 if keep > 1 else 0), min_std)
        mean_score = [float(x) for x in np.mean(scores, axis=0)]
        state.history.append({"best": list(state.score), "mean_score": mean_score, "mean": state.mean.tolist()})
        if on_iteration is not None and on_iteration(state):
            break
    return state
