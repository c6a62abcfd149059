# SPDX-License-Identifier: Apache-2.0
"""Laws of the searches: they climb, a seed decides everything, and an interruption changes nothing."""

import json
import math

import numpy as np
import pytest

from peft_svf.adaptation import Search
from peft_svf.adaptation.search import MIN_STD, Ascent, CrossEntropy, Judged, maximise

PEAK = np.array([0.8, 0.1, 0.4])
STARTS = np.array([[1 / 3] * 3, [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
SMALL = {"population": 12, "elites": 0.3}
all_methods = pytest.mark.parametrize("method", ["cem", "cma", "gradient"])


def judged(scores, gradients=None, **cost):
    """A verdict on members whose scores, tuples, are those of a single example."""
    return Judged(np.asarray(scores, float)[:, None, :], gradients, **cost)


def hill(members):
    """A score whose maximum is at `PEAK`, with its gradient and a cost."""
    scores = [(-float(((member - PEAK) ** 2).sum()),) for member in members]
    return judged(scores, -2 * (members - PEAK), tokens=10 * len(members), seconds=1.0)


class Recorder:
    """A judge that keeps each population it was shown, and may be interrupted at one."""

    def __init__(self, judge=hill, fails_at=None):
        self.judge, self.fails_at, self.populations = judge, fails_at, []

    def __call__(self, members):
        self.populations.append(members.copy())
        if len(self.populations) == self.fails_at:
            raise KeyboardInterrupt
        return self.judge(members)


def run(judge=hill, starts=STARTS, state=None, facts=None, **search):
    return maximise(Search(**SMALL | search), starts, judge, state=state, settings=facts)


def same(one, other):
    return np.array_equal(one.best, other.best) and one.score == other.score and one.history == other.history


@all_methods
@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_maximum_of_a_known_function(method, seed):
    found = run(method=method, seed=seed, iterations=60)
    np.testing.assert_allclose(found.best, PEAK, atol=0.03)
    assert found.score == hill([found.best]).scores[0]
    np.testing.assert_allclose(found.history[-1]["mean"], PEAK, atol=0.05)
    assert json.loads(json.dumps(found.history)) == found.history


@all_methods
def test_the_same_seed_gives_the_same_search_and_numpys_state_is_left_alone(method):
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    one = run(method=method, seed=7, iterations=5)
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(1)
    assert same(one, run(method=method, seed=7, iterations=5))
    if method != "gradient":  # which draws nothing
        assert not same(one, run(method=method, seed=8, iterations=5))


@all_methods
def test_the_starts_are_scored_in_the_first_population_and_members_stay_in_the_box(method):
    recorder = Recorder()
    run(recorder, method=method, low=-0.25, high=0.5, iterations=8)
    first = recorder.populations[0].tolist()
    starts = np.clip(STARTS, -0.25, 0.5).tolist()
    assert all(start in first for start in (starts[1:] if method == "cma" else starts))
    members = np.concatenate(recorder.populations)
    assert members.min() >= -0.25 and members.max() <= 0.5


@all_methods
@pytest.mark.parametrize("seed", range(3))
def test_the_best_is_the_best_ever_scored(method, seed):
    noise, seen = np.random.default_rng(seed), []

    def judge(members):
        scores = [(float(x),) for x in noise.standard_normal(len(members))]
        seen.extend(zip(scores, members.tolist(), strict=True))
        return judged(scores, np.zeros_like(members))

    found = run(judge, method=method, iterations=6)
    assert (found.score, found.best.tolist()) == max(seen, key=lambda entry: entry[0])
    best = [entry["best"] for entry in found.history]
    assert best == sorted(best)


@all_methods
def test_later_entries_of_a_score_break_ties_of_earlier_ones(method):
    def judge(members):
        slopes = np.stack([-np.sign(m - 0.2) for m in members])
        return judged([(1.0, -float(abs(m[1] - 0.2))) for m in members], slopes)

    assert abs(run(judge, method=method, iterations=40).best[1] - 0.2) < 0.03


def test_the_cross_entropy_method_keeps_its_best_and_never_stops_moving():
    recorder = Recorder()
    run(recorder, population=8, elites=0.5, iterations=4)  # several elites: their mean isn't the best
    for earlier, later in zip(recorder.populations, recorder.populations[1:], strict=False):
        assert later[0].tolist() == earlier[np.argmax(hill(earlier).by_example[:, 0, 0])].tolist()
    searcher = CrossEntropy(Search(population=5, elites=0.2), STARTS)
    for _ in range(30):
        members = searcher.ask()
        searcher.tell(members, hill(members).scores)
    assert searcher.std.tolist() == [MIN_STD] * 3  # one elite has no spread
    with pytest.raises(ValueError, match="population of 3 is too small for 4 starts"):
        run(population=3, elites=0.5)


def test_an_ascent_stays_where_gradients_are_not_finite():
    searcher = Ascent(Search(), np.array([[0.3, 0.6]]))
    for _ in range(3):
        searcher.tell(searcher.ask(), [(0.0,)], np.full((1, 2), np.nan))
    assert searcher.ask().tolist() == [[0.3, 0.6]] and searcher.mean.tolist() == [0.3, 0.6]


def test_cma_takes_one_number():
    found = run(lambda m: judged([(-abs(float(x) - 0.3),) for (x,) in m]), np.array([[0.5], [0.0]]), method="cma")
    assert found.best == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "luck"},
        {"method": "key", "per_layer": True},
        {"iterations": 0},
        {"population": 1},
        {"elites": 0.0},
        {"elites": 1.5},
        {"low": 1.0, "high": 1.0},
        {"low": math.nan},
        {"temperature": 0.0},
    ],
    ids=str,
)
def test_settings_that_leave_nothing_to_search_are_refused(settings):
    with pytest.raises(ValueError, match=r"one of the methods 'key', 'cem', .*low < high and a temperature above 0"):
        Search(**settings)


@all_methods
def test_a_resumed_search_equals_an_uninterrupted_one(method, tmp_path):
    whole = run(method=method, iterations=7)
    file = tmp_path / "runs" / "state.json"
    with pytest.raises(KeyboardInterrupt):
        run(Recorder(fails_at=4), method=method, iterations=7, state=file, facts={"seed": 0})
    assert len(json.loads(file.read_text())) == 3 and len(list(file.parent.iterdir())) == 1
    rest = Recorder()
    resumed = run(rest, method=method, iterations=7, state=file, facts={"seed": 0})
    assert same(whole, resumed) and len(rest.populations) == 7 - 3
    assert (resumed.tokens, resumed.seconds) == (whole.tokens, whole.seconds)
    assert np.array_equal(resumed.by_example, whole.by_example)
    longer = run(Recorder(), method=method, iterations=9, state=file, facts={"seed": 0})
    assert same(longer, run(method=method, iterations=9))


def test_a_member_without_a_score_is_the_worst_in_a_resumed_search_too(tmp_path):
    def judge(members):
        return judged([(math.nan if m[0] > 0.5 else float(m[0]), 0.1 + 0.2) for m in members])

    whole = run(judge)
    assert 0.4 < whole.best[0] <= 0.5 and not math.isnan(whole.score[0])
    assert np.isfinite(whole.history[-1]["mean"]).all()
    run(judge, iterations=3, state=tmp_path / "s.json")
    assert same(whole, run(judge, state=tmp_path / "s.json"))


def test_a_state_file_of_another_search_is_refused_and_left_alone(tmp_path):
    file, facts = tmp_path / "s.json", {"seed": 0, "examples": "abc"}
    run(iterations=2, state=file, facts=facts)
    before = file.read_bytes()
    for other in ({"facts": facts | {"examples": "xyz"}}, {"facts": facts, "seed": 5}):
        with pytest.raises(ValueError, match=r"s\.json belongs to another search: delete it, or pass the settings"):
            run(Recorder(fails_at=1), iterations=2, state=file, **other)
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", '{"settings": {}, "populations": []}', "[{}]"])
def test_a_damaged_state_file_or_one_of_another_version_is_refused(content, tmp_path):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(ValueError, match=r"search state .*s\.json can't be read .*: delete it to start over"):
        run(state=tmp_path / "s.json")


@pytest.mark.parametrize(
    "budget, populations", [({"max_tokens": 360}, 3), ({"max_seconds": 2.5}, 2), ({"max_tokens": 1}, 1), ({}, 9)]
)
def test_a_budget_is_never_exceeded_but_by_the_first_population(budget, populations, tmp_path):
    found = run(iterations=9, **budget)
    assert len(found.history) == populations and found.stopped == next(iter(budget), "")
    run(iterations=1, state=tmp_path / "s.json")  # the cost of an interrupted run counts
    resumed = run(iterations=9, state=tmp_path / "s.json", **budget)
    assert same(found, resumed) and resumed.stopped == found.stopped
