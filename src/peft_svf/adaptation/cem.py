# SPDX-License-Identifier: Apache-2.0
"""
Cross-entropy method over a vector in a box, as `ask` and `tell`: it draws populations and learns from their scores.

It knows no model and keeps no time; `search.maximise` runs it. The settings default to those of the reference code of
arXiv 2501.06252 (few-shot adaptation): population 32, elites 0.2 of it, half the range as spread, the best member
kept.
"""

from collections.abc import Sequence

import numpy as np


class CrossEntropy:
    """
    Draw a population around a mean, keep its elites, draw the next around theirs.

    Args:
        size (`int`):
            Length of the vector.
        population, elites (`int`, `float`):
            Members of a population and the share of it that shapes the next.
        low, high (`float`):
            Members are clamped to this range.
        min_std (`float`):
            Spread below which no direction falls.
        seed (`int`):
            Same seed and scores, same search.
        start (`Sequence`, *optional*):
            Mean of the first population; default `1 / size` everywhere.
        starts (`Sequence`):
            Vectors that are members of the first population, beside its mean.

    Attributes:
        mean, std (`np.ndarray` of shape `(size,)`): Where the next population is drawn.
        best, score (`np.ndarray` of shape `(size,)`, tuple): The best member so far and its score.

    Raises:
        `ValueError`: for settings that leave nothing to search with, or starts of another length.
    """

    def __init__(
        self,
        size: int,
        *,
        population: int = 32,
        elites: float = 0.2,
        low: float = 0.0,
        high: float = 1.0,
        min_std: float = 0.01,
        seed: int = 0,
        start: Sequence[float] | None = None,
        starts: Sequence[Sequence[float]] = (),
    ) -> None:
        self.keep = max(1, int(elites * population)) if elites > 0 else 0
        if size < 1 or population < 2 or not 1 <= self.keep <= population:
            raise ValueError(
                f"A search needs at least 1 number, 2 members and 1 elite; got size={size}, population={population}, "
                f"elites={elites} (so {self.keep})."
            )
        if not low < high or min_std < 0:
            raise ValueError(f"A search needs low < high and min_std >= 0; got {low}, {high} and {min_std}.")
        if any(len(vector) != size for vector in ([start] if start is not None else []) + list(starts)):
            lengths = [len(vector) for vector in starts]
            raise ValueError(f"The starts of a search over {size} numbers have lengths {lengths}, or its mean has.")
        if len(starts) >= population:
            raise ValueError(f"{len(starts)} starts leave no room in a population of {population}.")
        self.population, self.low, self.high, self.min_std = population, low, high, min_std
        self.mean = np.clip(np.full(size, 1 / size) if start is None else np.asarray(start, float), low, high)
        self.std = np.full(size, (high - low) / 2)
        self.best, self.score = self.mean, ()
        self._starts = [np.asarray(vector, float) for vector in starts]
        self._draws = np.random.default_rng(seed)

    best: np.ndarray
    score: tuple[float, ...]

    def ask(self) -> np.ndarray:
        """Draw the next population, `(population, size)`: first what is known, then what is drawn."""
        members = self.mean + self.std * self._draws.standard_normal((self.population, len(self.mean)))
        known = [self.best] if self.score else [self.mean, *self._starts]
        members[: len(known)] = known
        return np.clip(members, self.low, self.high)

    def tell(
        self, members: np.ndarray, scores: Sequence[tuple[float, ...]], gradients: np.ndarray | None = None
    ) -> None:
        """Learn from the scores of a population, larger is better; gradients are not looked at."""
        order = sorted(range(len(members)), key=lambda i: scores[i], reverse=True)
        if not self.score or scores[order[0]] > self.score:
            self.best, self.score = members[order[0]].copy(), scores[order[0]]
        elite = members[order[: self.keep]]
        self.mean = elite.mean(0)
        self.std = np.maximum(elite.std(0, ddof=1 if self.keep > 1 else 0), self.min_std)
