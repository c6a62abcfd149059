# SPDX-License-Identifier: Apache-2.0
"""
Search for the best vector in a box: a searcher draws populations, a judge scores them, [`maximise`] runs the two.

Three searchers: the cross-entropy method (few-shot adaptation in arXiv 2501.06252), CMA-ES and gradient ascent. An
interrupted search goes on from its state file. Nothing here knows a model.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import files

FORMAT = 4  # Another one makes older state files unreadable.
MIN_STD = 0.01  # the cross-entropy method's spread in a direction never falls below it
RATE = 0.05  # Adam's learning rate
Score = tuple[float, ...]  # compared entry by entry: later ones break ties of earlier ones


@dataclass(frozen=True)
class Search:
    """
    How mixture weights are searched. The defaults come from the paper's code (arXiv 2501.06252).

    Args:
        method (`str`):
            `"cem"`, the cross-entropy method; `"cma"`, CMA-ES (extra `search`); `"gradient"`, Adam on the
            log-likelihood of the answers, which climbs from the mean, the base and each expert at once; or `"key"`, no
            search but the expert whose routing key is nearest to the prompts, which takes a second.
        population, iterations (`int`): Members of a population (not of `"gradient"`), and number of populations.
        elites (`float`): Share of the population from which `"cem"` draws the next.
        low, high (`float`): Range of a weight.
        seed (`int`): The same seed finds the same mixture.
        max_tokens (`int`, *optional*), max_seconds (`float`, *optional*):
            Budgets, earlier runs of an interrupted search included. The search ends before the population that would
            exceed one, but scores at least one.
        per_layer (`bool`): One weight per expert and block of the model instead of one per expert.
        normalize (`bool`): Divide the weights by their sum. By default the base model has what is left of 1.
        temperature (`float`):
            Divides the log-likelihoods of choices before they become probabilities. At 1, one sure mistake outweighs
            everything else that a few examples show.

    Raises:
        `ValueError`: for an unknown method, or settings that leave nothing to search.
    """

    method: str = "cem"
    population: int = 32
    iterations: int = 50
    elites: float = 0.2
    low: float = 0.0
    high: float = 1.0
    seed: int = 0
    max_tokens: int | None = None
    max_seconds: float | None = None
    per_layer: bool = False
    normalize: bool = False
    temperature: float = 8.0

    def __post_init__(self) -> None:
        methods = ("key", *SEARCHERS)
        whole = self.iterations >= 1 and self.population >= 2 and 1 <= self.kept <= self.population
        box = self.low < self.high and self.temperature > 0
        by_key = self.method == "key" and self.per_layer  # Keys choose one expert for all layers.
        if self.method not in methods or by_key or not (whole and box):
            raise ValueError(
                f"A search has one of the methods {', '.join(map(repr, methods))} ('key' not per layer), at least 1 "
                f"iteration, 2 members and 1 elite, low < high and a temperature above 0; got {self}."
            )

    @property
    def kept(self) -> int:
        """Number of elites."""
        return max(1, int(self.elites * self.population)) if self.elites > 0 else 0

    def facts(self, choices: bool) -> dict[str, Any]:
        """Return the settings that the scores depend on, as JSON values; the temperature only matters for choices."""
        free = {"iterations", "max_tokens", "max_seconds"} | (set() if choices else {"temperature"})
        return {key: value for key, value in asdict(self).items() if key not in free}


class Judged(NamedTuple):
    """The scores of a population, and what they cost."""

    by_example: np.ndarray  # (members, examples, entries): larger is better, NaN is the worst
    gradients: np.ndarray | None = None  # (members, size), of the last entry of each score
    tokens: int = 0
    seconds: float = 0.0

    @property
    def scores(self) -> list[Score]:
        """Score of each member, the mean over the examples."""
        means = np.nan_to_num(self.by_example, nan=-np.inf, posinf=np.inf, neginf=-np.inf).mean(1)
        return [tuple(row) for row in means.tolist()]


class CrossEntropy:
    """
    Draw a population around a mean, and the next around the mean of its elites; the best member is kept.

    A searcher is deterministic for a seed: `ask` draws members `(n, size)` within the box, `tell` learns from their
    scores, `mean (size,)` is the centre. The first population holds `starts (n, size)`, and the first of them is its
    mean.
    """

    def __init__(self, search: Search, starts: np.ndarray) -> None:
        if len(starts) > search.population:
            raise ValueError(
                f"A population of {search.population} is too small for {len(starts)} starts: the mean, the base model "
                "and each expert."
            )
        self.search, self._fixed = search, np.clip(starts, search.low, search.high)
        self.mean = self._fixed[0]
        self.std = np.full(len(self.mean), (search.high - search.low) / 2)
        self._best: Score = ()
        self._draws = np.random.default_rng(search.seed)

    def ask(self) -> np.ndarray:
        """Draw the starts or the best member, then random ones."""
        members = self.mean + self.std * self._draws.standard_normal((self.search.population, len(self.mean)))
        members[: len(self._fixed)] = self._fixed
        return np.clip(members, self.search.low, self.search.high)

    def tell(self, members: np.ndarray, scores: Sequence[Score], gradients: np.ndarray | None = None) -> None:
        """Move to the elites."""
        order = sorted(range(len(members)), key=lambda i: scores[i], reverse=True)
        if scores[order[0]] > self._best:
            self._best, self._fixed = scores[order[0]], members[order[:1]].copy()
        elite = members[order[: self.search.kept]]
        self.mean = elite.mean(0)
        self.std = np.maximum(elite.std(0, ddof=1 if len(elite) > 1 else 0), MIN_STD)


class CovarianceAdaptation:
    """
    CMA-ES of the library `cma` (extra `search`), which learns from the order of the scores.

    The starts are scored with the first population, but it doesn't learn from them.
    """

    def __init__(self, search: Search, starts: np.ndarray) -> None:
        with files.extra("search", "CMA-ES needs the library cma"):
            import cma
        draws = np.random.default_rng(search.seed)
        self._starts = np.clip(starts, search.low, search.high)
        self.mean = self._starts[0]
        options = {
            "popsize": search.population,
            "bounds": [search.low, search.high],
            "randn": lambda *shape: draws.standard_normal(shape),  # Numpy's global state stays as it is,
            "seed": np.nan,  # and cma doesn't seed it.
            "verbose": -9,
        }
        self._strategy = cma.CMAEvolutionStrategy(self.mean, (search.high - search.low) / 4, options)

    def ask(self) -> np.ndarray:
        """Draw a population; the starts follow the first one."""
        return np.concatenate([np.stack(self._strategy.ask()), self._starts])

    def tell(self, members: np.ndarray, scores: Sequence[Score], gradients: np.ndarray | None = None) -> None:
        """Learn from the order of the scores; equal scores share a place."""
        drawn = len(members) - len(self._starts)
        places = {score: place for place, score in enumerate(sorted(set(scores[:drawn]), reverse=True))}
        self._strategy.tell(list(members[:drawn]), [float(places[score]) for score in scores[:drawn]])
        self.mean = np.asarray(self._strategy.result.xfavorite)
        self._starts = self._starts[:0]


class Ascent:
    """Gradient ascent by Adam on the last entry of the scores, from all starts at once, within the box."""

    def __init__(self, search: Search, starts: np.ndarray) -> None:
        self.search, self._points = search, torch.tensor(starts, dtype=torch.float64).clamp(search.low, search.high)
        self._adam = torch.optim.Adam([self._points], lr=RATE, maximize=True)
        self.mean = self.ask()[0]

    def ask(self) -> np.ndarray:
        """Return the points reached, `(starts, size)`."""
        return self._points.numpy().copy()

    def tell(self, members: np.ndarray, scores: Sequence[Score], gradients: np.ndarray | None = None) -> None:
        """Take one step from each point; one whose gradient isn't finite stays."""
        assert gradients is not None
        self._points.grad = torch.from_numpy(np.nan_to_num(gradients, nan=0.0, posinf=0.0, neginf=0.0))
        self._adam.step()
        self._points.clamp_(self.search.low, self.search.high)
        self.mean = self.ask()[max(range(len(scores)), key=lambda i: scores[i])]


Searcher = CrossEntropy | CovarianceAdaptation | Ascent
SEARCHERS: dict[str, type[Searcher]] = {"cem": CrossEntropy, "cma": CovarianceAdaptation, "gradient": Ascent}


@dataclass
class Found:
    """The state of a search; its cost includes interrupted runs."""

    best: np.ndarray  # (size,), the first of equals
    members: np.ndarray  # (n, size), all so far
    by_example: np.ndarray  # (n, examples, entries), their scores
    score: Score = ()  # the score of `best`
    history: list[dict[str, Any]] = field(default_factory=list)  # per population: best, mean score, next centre
    tokens: int = 0
    seconds: float = 0.0
    stopped: str = ""  # the budget that ended the search early

    def add(self, members: np.ndarray, judged: Judged, searcher: Searcher) -> None:
        """Add the scores of a population, and move the searcher."""
        by_example, scores = np.asarray(judged.by_example, float), judged.scores
        top = max(range(len(scores)), key=lambda i: scores[i])  # (first of equals)
        if scores[top] > self.score:
            self.best, self.score = members[top].copy(), scores[top]
        searcher.tell(members, scores, judged.gradients)
        self.members = np.concatenate([self.members, members])
        self.by_example = np.concatenate([*([self.by_example] if self.history else []), by_example])
        self.tokens += judged.tokens
        self.seconds += judged.seconds
        mean_score = np.mean(scores, axis=0).tolist()
        self.history.append({"best": list(self.score), "mean_score": mean_score, "mean": searcher.mean.tolist()})


def maximise(
    search: Search,
    starts: np.ndarray,
    judge: Callable[[np.ndarray], Judged],
    *,
    state: str | PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    reserve: float = 0.0,
    on_iteration: Callable[[Found], None] | None = None,
) -> Found:
    """
    Search from `starts (n, size)` until the iterations or a budget are used up.

    Args:
        state (`str` or path, *optional*):
            File with the scores so far, replaced as a whole after each population. The searcher draws again what it
            drew before an interruption, and these scores are used in place of the judge's.
        settings (`Mapping`, *optional*): JSON values that the scores depend on; a state file with others is refused.
        reserve (`float`): Members of a population whose cost the budgets must also hold, for a check of the result.
    """
    searcher = SEARCHERS[search.method](search, starts)
    found = Found(searcher.mean, np.empty((0, starts.shape[1])), np.empty(0))
    past = [] if state is None else _read(Path(state))
    depends = json.dumps({"format": FORMAT, **(settings or {})}, sort_keys=True).encode()
    for iteration in range(search.iterations):
        members = searcher.ask()
        digest = hashlib.sha256(depends + np.ascontiguousarray(members).tobytes()).hexdigest()
        if iteration == len(past):
            if past and (stopped := _exceeded(search, found, past[-1][1], reserve)):
                found.stopped = stopped
                break
            past.append((digest, judge(members)))
            if state is not None:
                entries = [{"digest": key, **judged._asdict()} for key, judged in past]
                files.write(state, json.dumps(entries, default=np.ndarray.tolist))
        if past[iteration][0] != digest:
            raise ValueError(
                f"The search state {state} belongs to another search: delete it, or pass the settings, examples and "
                "experts of that search."
            )
        found.add(members, past[iteration][1], searcher)
        if on_iteration is not None:
            on_iteration(found)
    return found


def _exceeded(search: Search, found: Found, last: Judged, reserve: float) -> str:
    """Name the budget that one more population like the last, and the reserve, would exceed; `""` if none."""
    more = 1 + reserve / len(last.by_example)
    for budget in ("tokens", "seconds"):
        limit = getattr(search, f"max_{budget}")
        if limit is not None and getattr(found, budget) + more * getattr(last, budget) > limit:
            return f"max_{budget}"
    return ""


def _read(path: Path) -> list[tuple[str, Judged]]:
    """Read the populations of a state file; a missing file has none."""
    if not path.exists():
        return []
    past = []
    try:
        for entry in files.read_json(path):
            by_example, slopes = (entry[name] and np.asarray(entry[name], float) for name in Judged._fields[:2])
            past.append((entry["digest"], Judged(by_example, slopes, entry["tokens"], entry["seconds"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The search state {path} can't be read ({error!r}): delete it to start over.") from error
    return past
