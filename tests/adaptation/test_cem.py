# SPDX-License-Identifier: Apache-2.0
"""Laws of the cross-entropy method: it climbs, it never loses its best, and a seed decides everything."""

import math

import numpy as np
import pytest

from peft_svf.adaptation.cem import CrossEntropy
from peft_svf.adaptation.search import Judged, maximise

PEAK = np.array([0.8, 0.1, 0.4])


def cross_entropy_method(evaluate, size, *, iterations=50, on_iteration=None, **settings):
    """The whole search: its end has `best`, `score`, `history`, and `mean` and `std` of the searcher."""
    searcher = CrossEntropy(size, **settings)
    watch = None if on_iteration is None else lambda found: on_iteration(found)
    found = maximise(searcher, lambda members: Judged(evaluate(members)), iterations, on_iteration=watch)
    found.mean, found.std = searcher.mean, searcher.std
    return found


def hill(members):
    """A score whose maximum is at `PEAK`."""
    return [(-float(((member - PEAK) ** 2).sum()),) for member in members]


class Recorder:
    """Scores like another function and keeps every member it was shown."""

    def __init__(self, score=hill):
        self.score, self.populations = score, []

    def __call__(self, members):
        self.populations.append(members.copy())
        return self.score(members)

    @property
    def members(self):
        return np.concatenate(self.populations)


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_maximum_of_a_known_function(seed):
    found = cross_entropy_method(hill, 3, seed=seed)
    np.testing.assert_allclose(found.best, PEAK, atol=0.03)
    assert found.score == hill([found.best])[0]


def test_the_same_seed_gives_the_same_search():
    one, two, other = (cross_entropy_method(hill, 3, iterations=5, seed=seed) for seed in (7, 7, 8))
    assert np.array_equal(one.best, two.best) and one.history == two.history
    assert not np.array_equal(one.best, other.best)


def test_the_state_of_numpy_neither_matters_nor_changes():
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    one = cross_entropy_method(hill, 3, iterations=3)
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(1)
    assert np.array_equal(one.best, cross_entropy_method(hill, 3, iterations=3).best)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_is_no_worse_than_any_member_ever_scored(seed):
    noise = np.random.default_rng(seed)
    recorder = Recorder(lambda members: [(float(x),) for x in noise.standard_normal(len(members))])
    scores = []

    def remember(members):
        scores.extend(recorder(members))
        return scores[-len(members) :]

    found = cross_entropy_method(remember, 3, population=8, elites=0.5, iterations=6, seed=seed)
    place = scores.index(max(scores))
    assert found.score == scores[place] and np.array_equal(found.best, recorder.members[place])
    best = [entry["best"] for entry in found.history]
    assert best == sorted(best)


def test_the_first_population_holds_the_mean_and_the_starts():
    starts = [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.2, 0.9, 0.3]]
    recorder = Recorder()
    cross_entropy_method(recorder, 3, population=8, iterations=2, starts=starts)
    assert recorder.populations[0][:4].tolist() == [[1 / 3] * 3, *starts]


def test_the_next_population_holds_the_best_so_far():
    recorder, states = Recorder(), []
    settings = {"population": 8, "elites": 0.5, "iterations": 4}  # several elites: their mean is not the best
    cross_entropy_method(recorder, 3, **settings, on_iteration=lambda state: states.append(state.best.copy()))
    for population, best in zip(recorder.populations[1:], states, strict=False):
        assert np.array_equal(population[0], best)


def test_members_are_clamped_to_the_range_and_starts_too():
    recorder = Recorder()
    cross_entropy_method(recorder, 3, low=-0.25, high=0.5, iterations=5, starts=[[9.0, -9.0, 0.1]])
    assert recorder.members.min() == -0.25 and recorder.members.max() == 0.5
    assert recorder.populations[0][1].tolist() == [0.5, -0.25, 0.1]
    assert recorder.populations[0][0].tolist() == [1 / 3] * 3


def test_no_direction_stops_moving_below_min_std():
    flat = Recorder(lambda members: [(0.0,)] * len(members))
    low, none = (cross_entropy_method(Recorder(), 3, iterations=30, min_std=std) for std in (0.05, 0.0))
    assert low.std.min() >= 0.05 > none.std.min()
    wide = cross_entropy_method(flat, 3, iterations=3, min_std=10.0)
    assert wide.std.tolist() == [10.0] * 3


def test_a_callback_that_says_true_ends_the_search():
    seen = []
    found = cross_entropy_method(hill, 3, iterations=50, on_iteration=lambda s: seen.append(s.score) or len(seen) == 3)
    assert len(seen) == len(found.history) == 3


def test_later_entries_of_a_score_break_ties_of_earlier_ones():
    def score(members):
        return [(float(member[0] > 0.5), float(-abs(member[1] - 0.2))) for member in members]

    found = cross_entropy_method(score, 2, seed=1)
    assert found.score[0] == 1.0 and abs(found.best[1] - 0.2) < 0.02


def test_a_member_without_a_score_is_the_worst():
    def score(members):
        return [(math.nan if member[0] > 0.5 else float(member[0]),) for member in members]

    found = cross_entropy_method(score, 1, seed=0)
    assert 0.4 < found.best[0] <= 0.5 and not math.isnan(found.score[0])
    assert np.isfinite(found.mean).all()


def test_one_elite_and_one_number_are_enough():
    found = cross_entropy_method(lambda members: [(float(m[0]),) for m in members], 1, population=5, iterations=20)
    assert found.best[0] > 0.95 and found.std.tolist() == [0.01]


def test_the_history_is_json():
    import json

    found = cross_entropy_method(hill, 3, iterations=2)
    entry = json.loads(json.dumps(found.history))[1]
    assert len(entry["best"]) == len(entry["mean_score"]) == 1 and len(entry["mean"]) == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"size": 0}, "size=0"),
        ({"iterations": 0}, "iterations=0"),
        ({"population": 1}, "population=1"),
        ({"elites": 0.0}, "elites=0.0"),
        ({"elites": 1.5}, "elites=1.5"),
        ({"low": 1.0, "high": 1.0}, "low < high"),
        ({"low": math.nan}, "low < high"),
        ({"min_std": -0.1}, "min_std"),
        ({"starts": [[0.0, 0.0]]}, r"lengths \[2\]"),
        ({"start": [0.0, 0.0]}, "or its mean has"),
        ({"starts": [[0.0]]}, r"lengths \[1\]"),
        ({"population": 5, "starts": [[0.0] * 3] * 5}, "5 starts leave no room in a population of 5"),
    ],
)
def test_settings_that_leave_nothing_to_search_with_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy_method(hill, **({"size": 3} | settings))
