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

FORMAT = 3  # of state files
MIN_STD = 0.01  # the cross-entropy method's spread in a direction never falls below it
RATE = 0.05  # of Adam
Score = tuple[float, ...]  # compared entry by entry: later ones break ties of earlier ones


@dataclass(frozen=True)
class Search:
    """
    How mixture weights are searched. The defaults are those of the paper's code (arXiv 2501.06252).

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
        if self.method not in (methods := ("key", *SEARCHERS)):
            raise ValueError(f"There is no search {self.method!r}: choose one of {', '.join(map(repr, methods))}.")
        if self.method == "key" and self.per_layer:
            raise ValueError("Keys choose one expert for all layers: per_layer=True needs another method.")
        whole = self.iterations >= 1 and self.population >= 2 and 1 <= self.kept <= self.population
        if not (whole and self.low < self.high and self.temperature > 0):
            raise ValueError(
                "A search needs at least 1 iteration, 2 members and 1 elite, low < high and a temperature above 0; "
                f"got {self}."
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
    """
    The scores of a population.

    Args:
        by_example (`np.ndarray` of shape `(members, examples, entries)`): Larger is better, NaN is the worst.
        gradients (`np.ndarray` of shape `(members, size)`, *optional*): Of the last entry of each score.
        tokens (`int`), seconds (`float`): The cost.
    """

    by_example: np.ndarray
    gradients: np.ndarray | None = None
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
    scores, `mean (size,)` is the centre.

    Args:
        search ([`Search`]): Its settings.
        starts (`np.ndarray` of shape `(n, size)`): Members of the first population; the first of them is its mean.
    """

    def __init__(self, search: Search, starts: np.ndarray) -> None:
        if len(starts) > search.population:
            raise ValueError(
                f"A population of {search.population} is too small for {len(starts)} starts: the mean, the base model "
                "and each expert."
            )
        self.search, self._starts = search, np.clip(starts, search.low, search.high)
        self.mean = self._starts[0]
        self.std = np.full(len(self.mean), (search.high - search.low) / 2)
        self._best: tuple[Score, np.ndarray] | None = None
        self._draws = np.random.default_rng(search.seed)

    def ask(self) -> np.ndarray:
        """Draw the starts or the best member, then random ones."""
        members = self.mean + self.std * self._draws.standard_normal((self.search.population, len(self.mean)))
        fixed = self._starts if self._best is None else self._best[1][None]
        members[: len(fixed)] = fixed
        return np.clip(members, self.search.low, self.search.high)

    def tell(self, members: np.ndarray, scores: Sequence[Score], gradients: np.ndarray | None = None) -> None:
        """Move to the elites."""
        order = sorted(range(len(members)), key=lambda i: scores[i], reverse=True)
        if self._best is None or scores[order[0]] > self._best[0]:
            self._best = scores[order[0]], members[order[0]].copy()
        elite = members[order[: self.search.kept]]
        self.mean = elite.mean(0)
        self.std = np.maximum(elite.std(0, ddof=1 if len(elite) > 1 else 0), MIN_STD)


class CovarianceAdaptation:
    """
    CMA-ES of the library `cma` (extra `search`), which learns from the order of the scores.

    The starts are scored beside the first population, and not learnt from.
    """

    def __init__(self, search: Search, starts: np.ndarray) -> None:
        try:
            import cma
        except ImportError as error:
            raise ImportError('CMA-ES needs the library cma: pip install "peft-svf[search]".') from error
        if starts.shape[1] < 2:
            raise ValueError("CMA-ES searches 2 numbers or more, got 1: use the method 'cem' or 'gradient'.")
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
        """Take one step from each point; one whose gradient isn't finite stays. Raises `ValueError` without any."""
        if gradients is None:
            raise ValueError("Gradient ascent needs a judge that returns gradients.")
        self._points.grad = torch.from_numpy(np.nan_to_num(gradients, nan=0.0, posinf=0.0, neginf=0.0))
        self._adam.step()
        self._points.clamp_(self.search.low, self.search.high)
        self.mean = self.ask()[max(range(len(scores)), key=lambda i: scores[i])]


Searcher = CrossEntropy | CovarianceAdaptation | Ascent
SEARCHERS: dict[str, type[Searcher]] = {"cem": CrossEntropy, "cma": CovarianceAdaptation, "gradient": Ascent}


@dataclass
class Found:
    """
    The state of a search.

    Args:
        best (`np.ndarray` of shape `(size,)`): The best member so far, the first of equals.
        members (`np.ndarray` of shape `(n, size)`): All members so far.
        by_example (`np.ndarray` of shape `(n, examples, entries)`): Their scores.
        score (`tuple[float, ...]`): The score of the best.
        history (`list[dict]`): Per population the best score so far, the mean score, and the centre of the next.
        tokens (`int`), seconds (`float`): The cost so far, interrupted runs included.
        stopped (`str`): The budget that ended the search early, or `""`.
    """

    best: np.ndarray
    members: np.ndarray
    by_example: np.ndarray
    score: Score = ()
    history: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    stopped: str = ""


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
    Search until the iterations or a budget are used up.

    Args:
        search, starts: As in [`CrossEntropy`].
        judge (`Callable`): Members `(n, size)` -> [`Judged`].
        state (`str` or path, *optional*):
            File with the scores so far, replaced as a whole after each population. The searcher draws again what it
            drew before an interruption, and these scores are used in place of the judge's.
        settings (`Mapping`, *optional*): JSON values that the scores depend on; a state file with others is refused.
        reserve (`float`): Members of a population whose cost the budgets must also hold, for a check of the result.
        on_iteration (`Callable`, *optional*): Called after each population.

    Raises:
        `ValueError`: if the state file is damaged or belongs to another search.
    """
    searcher = SEARCHERS[search.method](search, starts)
    settings = json.loads(json.dumps({"format": FORMAT, **(settings or {})}))
    past = [] if state is None else _read(Path(state), settings)
    found = Found(searcher.mean, np.empty((0, starts.shape[1])), np.empty(0))
    for iteration in range(search.iterations):
        members = searcher.ask()
        digest = hashlib.sha256(np.ascontiguousarray(members).tobytes()).hexdigest()
        if iteration == len(past):
            if past and (stopped := _exceeded(search, found, past[-1], reserve)):
                found.stopped = stopped
                break
            past.append({"digest": digest, **judge(members)._asdict()})
            if state is not None:
                files.write(state, json.dumps({"settings": settings, "populations": past}, default=np.ndarray.tolist))
        if past[iteration]["digest"] != digest:
            raise _other_search(state, ["the numbers drawn"])
        _record(found, members, past[iteration], searcher)
        if on_iteration is not None:
            on_iteration(found)
    return found


def _record(found: Found, members: np.ndarray, entry: Mapping[str, Any], searcher: Searcher) -> None:
    """Add the scores of a population to the state of the search, and move the searcher."""
    by_example = np.asarray(entry["by_example"], float)
    scores = Judged(by_example).scores
    top = max(range(len(scores)), key=lambda i: scores[i])  # (first of equals)
    if not found.score or scores[top] > found.score:
        found.best, found.score = members[top].copy(), scores[top]
    searcher.tell(members, scores, None if entry["gradients"] is None else np.asarray(entry["gradients"], float))
    found.members = np.concatenate([found.members, members])
    found.by_example = np.concatenate([found.by_example, by_example]) if found.by_example.size else by_example
    found.tokens += entry["tokens"]
    found.seconds += entry["seconds"]
    mean_score = np.mean(scores, axis=0).tolist()
    found.history.append({"best": list(found.score), "mean_score": mean_score, "mean": searcher.mean.tolist()})


def _exceeded(search: Search, found: Found, last: Mapping[str, Any], reserve: float) -> str:
    """Name the budget that one more population like the last, and the reserve, would exceed; `""` if none."""
    more = 1 + reserve / len(last["by_example"])
    for budget in ("tokens", "seconds"):
        limit = getattr(search, f"max_{budget}")
        if limit is not None and getattr(found, budget) + more * last[budget] > limit:
            return f"max_{budget}"
    return ""


def _read(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read the populations of a state file; a missing file has none."""
    if not path.exists():
        return []
    try:
        content = files.read_json(path)
        saved, keys = dict(content["settings"]), ("digest", *Judged._fields)
        past = [{key: entry[key] for key in keys} for entry in content["populations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The search state {path} can't be read ({error!r}): delete it to start over.") from error
    if differing := [key for key in sorted({*saved, *settings}) if saved.get(key) != settings.get(key)]:
        raise _other_search(path, differing)
    return past


def _other_search(path: Any, differing: Sequence[str]) -> ValueError:
    return ValueError(
        f"The search state {path} belongs to another search ({', '.join(differing)} differ): delete it, or pass the "
        "settings, examples and experts of that search."
    )
