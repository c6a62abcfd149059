# SPDX-License-Identifier: Apache-2.0
"""
Run a search over vectors: a searcher asks for scores of populations, a judge gives them, the best vector comes out.

`maximise` keeps budgets and a state file from which an interrupted search goes on; beside the cross-entropy method
(`cem`) there are CMA-ES (library `cma`) and gradient ascent. Nothing here knows a model.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

FORMAT = 2  # of state files
Score = tuple[float, ...]  # compared entry by entry: later ones break ties of earlier ones


class Judged(NamedTuple):
    """
    What a judge says of a population.

    Args:
        scores (`list[tuple[float, ...]]`): One per member, larger is better, NaN the worst.
        gradients (`np.ndarray` of shape `(members, size)`, *optional*): Of the last entry of each score.
        tokens (`int`), seconds (`float`): What it cost.
        each (`np.ndarray` of shape `(members, examples, entries)`, *optional*): The scores of single examples, whose
            mean the scores are; a check of the result needs them.
    """

    scores: list[Score]
    gradients: np.ndarray | None = None
    tokens: int = 0
    seconds: float = 0.0
    each: np.ndarray | None = None


class Searcher(Protocol):
    """Draws populations `(members, size)` and learns from their scores; the same seed and scores, the same draws."""

    mean: np.ndarray

    def ask(self) -> np.ndarray: ...

    def tell(self, members: np.ndarray, scores: Sequence[Score], gradients: np.ndarray | None = None) -> None: ...


@dataclass
class Found:
    """
    Where a search stands.

    Args:
        best (`np.ndarray` of shape `(size,)`): The best member ever scored; of equal ones the first.
        score (`tuple[float, ...]`): Its score.
        history (`list[dict]`): Per population the best score so far, the mean score, the centre of the next.
        members (`np.ndarray` of shape `(n, size)`), each (`np.ndarray` of shape `(n, examples, entries)`, *optional*):
            All that were scored, and their scores by example.
        tokens (`int`), seconds (`float`): What scoring has cost, runs before an interruption included.
        stopped (`str`): The budget that ended the search early, or nothing.
    """

    best: np.ndarray
    score: Score = ()
    history: list[dict[str, Any]] = field(default_factory=list)
    members: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    each: np.ndarray | None = None
    tokens: int = 0
    seconds: float = 0.0
    stopped: str = ""


def maximise(
    searcher: Searcher,
    judge: Callable[[np.ndarray], Judged],
    iterations: int,
    *,
    state: str | PathLike[str] | None = None,
    writes: bool = True,
    settings: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    max_seconds: float | None = None,
    reserve: float = 0.0,
    on_iteration: Callable[[Found], bool | None] | None = None,
) -> Found:
    """
    Let a searcher ask a judge until its iterations or a budget are used up.

    Args:
        searcher ([`Searcher`]):
            A fresh one.
        judge (`Callable`):
            `(members, size)` array -> [`Judged`].
        iterations (`int`):
            Populations, those in the state file included.
        state (`str` or path, *optional*):
            File with the scores so far, replaced whole after each population. If it exists, its scores are taken
            instead of the judge's: the searcher asks the same again, so a search that was interrupted goes on as if
            it had not been.
        writes (`bool`):
            Whether this process writes the file; one of several does.
        settings (`Mapping`, *optional*):
            JSON values on which the scores depend; a state file with others is refused.
        max_tokens, max_seconds (*optional*):
            The search ends before the population that would go beyond, judging by the cost of the one before. The
            first population is always scored.
        reserve (`float`):
            What the budgets have to hold besides, for a check of the result, as a number of members of a population.
        on_iteration (`Callable`, *optional*):
            Called after each population; `True` ends the search.

    Returns:
        [`Found`].

    Raises:
        `ValueError`: without an iteration, or if the state file is damaged, of another version or of another search.
    """
    if iterations < 1:
        raise ValueError(f"A search needs at least 1 iteration, got iterations={iterations}.")
    settings = json.loads(json.dumps(dict(settings or {})))
    past = _read(Path(state), settings) if state is not None else []
    found = Found(best=searcher.mean)
    asked: list[np.ndarray] = []
    for iteration in range(iterations):
        members = searcher.ask()
        digest = hashlib.sha256(np.ascontiguousarray(members).tobytes()).hexdigest()
        if iteration == len(past):
            found.stopped = _spent(found, past, max_tokens, max_seconds, reserve)
            if found.stopped:
                break
            past.append(_entry(judge, members, digest))
            if state is not None and writes:
                _write(Path(state), settings, past)
        entry = past[iteration]
        if entry["members"] != digest:
            raise ValueError(
                f"The search state {state} was written by a search that drew other numbers in population {iteration} "
                "(another version or machine): delete it to begin anew."
            )
        asked.append(members)
        scores = [tuple(-math.inf if math.isnan(x) else float(x) for x in score) for score in entry["scores"]]
        top = max(range(len(scores)), key=lambda i: scores[i])  # the first of equal ones
        if not found.score or scores[top] > found.score:
            found.best, found.score = members[top].copy(), scores[top]
        gradients = None if entry["gradients"] is None else np.asarray(entry["gradients"], float)
        searcher.tell(members, scores, gradients)
        found.tokens += entry["tokens"]
        found.seconds += entry["seconds"]
        mean_score = [float(x) for x in np.mean(scores, axis=0)]
        found.history.append({"best": list(found.score), "mean_score": mean_score, "mean": searcher.mean.tolist()})
        if on_iteration is not None and on_iteration(found):
            break
    found.members = np.concatenate(asked)
    if all(entry["each"] is not None for entry in past[: len(asked)]):
        found.each = np.concatenate([np.asarray(entry["each"], float) for entry in past[: len(asked)]])
    return found


class CovarianceAdaptation:
    """
    CMA-ES of the library `cma` (extra `search`), which learns from the order of scores alone.

    Args:
        size, population, low, high, seed, start, starts: As in [`CrossEntropy`].

    Raises:
        `ImportError`: without the library.
        `ValueError`: for a single number, for which `cma` is not made, or a population too small.
    """

    def __init__(
        self,
        size: int,
        *,
        population: int = 32,
        low: float = 0.0,
        high: float = 1.0,
        seed: int = 0,
        start: Sequence[float] | None = None,
        starts: Sequence[Sequence[float]] = (),
    ) -> None:
        try:
            import cma
        except ImportError as error:
            raise ImportError('CMA-ES needs the library cma: pip install "peft-svf[search]".') from error
        if size < 2:
            raise ValueError('CMA-ES searches 2 numbers or more, got 1: use method="cem" or "gradient".')
        if population < 4:
            raise ValueError(f"CMA-ES needs a population of 4 or more, got {population}.")
        draws = np.random.default_rng(seed)
        self.mean = np.clip(np.full(size, 1 / size) if start is None else np.asarray(start, float), low, high)
        options = {
            "popsize": population,
            "bounds": [low, high],
            "randn": lambda *shape: draws.standard_normal(shape),  # numpy's global state is left alone
            "seed": np.nan,  # so cma does not seed it either
            "verbose": -9,
        }
        self._search = cma.CMAEvolutionStrategy(self.mean, (high - low) / 4, options)
        self._starts = np.clip(np.asarray(starts, float).reshape(-1, size), low, high)

    def ask(self) -> np.ndarray:
        """Draw a population `(population, size)`; the first has the starts behind it, which are scored, not learnt."""
        return np.concatenate([np.stack(self._search.ask()), self._starts])

    def tell(self, members: np.ndarray, scores: Sequence[Score], gradients: np.ndarray | None = None) -> None:
        """Learn from the order of the scores; equal ones have one place."""
        drawn = len(members) - len(self._starts)
        places = {score: place for place, score in enumerate(sorted(set(scores[:drawn]), reverse=True))}
        self._search.tell(list(members[:drawn]), [float(places[score]) for score in scores[:drawn]])
        self.mean = np.asarray(self._search.result.xfavorite)
        self._starts = self._starts[:0]


class Ascent:
    """
    Gradient ascent (Adam) on the last entry of the scores, from every start and the mean at once, within a box.

    Args:
        size, low, high, start, starts: As in [`CrossEntropy`].
        rate (`float`): Step length.
    """

    def __init__(
        self,
        size: int,
        *,
        low: float = 0.0,
        high: float = 1.0,
        rate: float = 0.05,
        start: Sequence[float] | None = None,
        starts: Sequence[Sequence[float]] = (),
    ) -> None:
        first = np.full(size, 1 / size) if start is None else np.asarray(start, float)
        self.low, self.high, self.rate = low, high, rate
        self._members = np.clip(np.stack([first, *(np.asarray(vector, float) for vector in starts)]), low, high)
        self.mean = self._members[0]
        self._first, self._second, self._steps = np.zeros_like(self._members), np.zeros_like(self._members), 0

    def ask(self) -> np.ndarray:
        """The points of the climb, `(starts + 1, size)`."""
        return self._members.copy()

    def tell(self, members: np.ndarray, scores: Sequence[Score], gradients: np.ndarray | None = None) -> None:
        """
        Take one step (arXiv 1412.6980) from each point; a point whose gradient is not finite stays where it is.

        Raises:
            `ValueError`: without gradients.
        """
        if gradients is None:
            raise ValueError("Gradient ascent needs a judge that gives gradients.")
        slope = np.nan_to_num(gradients, nan=0.0, posinf=0.0, neginf=0.0)
        self._steps += 1
        self._first = 0.9 * self._first + 0.1 * slope
        self._second = 0.999 * self._second + 0.001 * slope**2
        first, second = self._first / (1 - 0.9**self._steps), self._second / (1 - 0.999**self._steps)
        self._members = np.clip(members + self.rate * first / (np.sqrt(second) + 1e-8), self.low, self.high)
        self.mean = self._members[max(range(len(scores)), key=lambda i: scores[i])]


def _spent(found: Found, past: list[dict], max_tokens: int | None, max_seconds: float | None, reserve: float) -> str:
    """The name of the budget that one more population like the last, and the reserve, would go beyond, or nothing."""
    if not past:
        return ""
    more = 1 + reserve / len(past[-1]["scores"])
    if max_tokens is not None and found.tokens + more * past[-1]["tokens"] > max_tokens:
        return "max_tokens"
    if max_seconds is not None and found.seconds + more * past[-1]["seconds"] > max_seconds:
        return "max_seconds"
    return ""


def _entry(judge: Callable[[np.ndarray], Judged], members: np.ndarray, digest: str) -> dict[str, Any]:
    judged = judge(members)
    return {
        "members": digest,
        "scores": [[float(x) for x in score] for score in judged.scores],
        "gradients": None if judged.gradients is None else judged.gradients.tolist(),
        "each": None if judged.each is None else judged.each.tolist(),
        "tokens": int(judged.tokens),
        "seconds": float(judged.seconds),
    }


def _read(path: Path, settings: Mapping[str, Any]) -> list[dict]:
    """The populations that a state file holds, none if there is no file."""
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        there, past, version = content["settings"], content["populations"], content.get("format", 1)
        whole = all({"members", "scores", "gradients", "each", "tokens", "seconds"} <= set(entry) for entry in past)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The search state {path} cannot be read ({error!r}): delete it to begin anew.") from error
    if version != FORMAT:
        raise ValueError(
            f"The search state {path} was written by another version of peft-svf (its format is {version}, expected "
            f"{FORMAT}): delete it to begin anew, or go on with that version."
        )
    if not whole:
        raise ValueError(f"The search state {path} is damaged: delete it to begin anew.")
    if odd := [key for key in sorted({*there, *settings}) if there.get(key) != settings.get(key)]:
        raise ValueError(
            f"The search state {path} is of another search: {_difference(odd[0], there, settings)}. Give the "
            "settings, examples and experts that it began with, or another file."
        )
    return past


def _difference(key: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What is another value in a state file, or of a mapping which entries."""
    old, new = there.get(key), here.get(key)
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return f"{key} is {old!r} there and {new!r} here"
    names = {
        "new": new.keys() - old.keys(),
        "gone": old.keys() - new.keys(),
        "changed": {name for name in old.keys() & new.keys() if old[name] != new[name]},
    }
    return f"of its {key} " + "; ".join(f"{what}: {', '.join(sorted(n))}" for what, n in names.items() if n)


def _write(path: Path, settings: Mapping[str, Any], past: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps({"format": FORMAT, "settings": settings, "populations": past}), encoding="utf-8")
    temporary.replace(path)
