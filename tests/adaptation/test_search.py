# SPDX-License-Identifier: Apache-2.0
"""Laws of the searches: they climb, a seed decides everything, and an interruption changes nothing."""

import json
import math
import sys

import numpy as np
import pytest

from peft_svf.adaptation.cem import CrossEntropy
from peft_svf.adaptation.search import Ascent, CovarianceAdaptation, Judged, maximise

PEAK = np.array([0.8, 0.1, 0.4])
STARTS = [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
SEARCHERS = {
    "cem": lambda **kw: CrossEntropy(3, population=12, elites=0.3, starts=STARTS, **kw),
    "cma": lambda **kw: CovarianceAdaptation(3, population=12, starts=STARTS, **kw),
    "gradient": lambda seed=0, **kw: Ascent(3, starts=STARTS, **kw),
}
all_searchers = pytest.mark.parametrize("kind", SEARCHERS)


def hill(members):
    """A score whose maximum is at `PEAK`, with its gradient and a cost."""
    scores = [(-float(((member - PEAK) ** 2).sum()),) for member in members]
    return Judged(scores, -2 * (members - PEAK), tokens=10 * len(members), seconds=1.0)


class Failing:
    """A judge that is interrupted at its n-th population."""

    def __init__(self, at, error=KeyboardInterrupt):
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, members):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return hill(members)


def same(one, other):
    return np.array_equal(one.best, other.best) and one.score == other.score and one.history == other.history


@all_searchers
def test_it_finds_the_maximum_of_a_known_function(kind):
    found = maximise(SEARCHERS[kind](), hill, 60)
    np.testing.assert_allclose(found.best, PEAK, atol=0.03)
    assert found.score == hill([found.best]).scores[0]
    np.testing.assert_allclose(found.history[-1]["mean"], PEAK, atol=0.05)


@all_searchers
def test_the_same_seed_gives_the_same_search_and_numpys_state_is_left_alone(kind):
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    one = maximise(SEARCHERS[kind](seed=7), hill, 5)
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(1)
    assert same(one, maximise(SEARCHERS[kind](seed=7), hill, 5))
    if kind != "gradient":  # which draws nothing
        assert not same(one, maximise(SEARCHERS[kind](seed=8), hill, 5))


@all_searchers
def test_the_starts_are_scored_in_the_first_population_and_members_stay_in_the_box(kind):
    populations = []
    maximise(SEARCHERS[kind](low=-0.25, high=0.5), lambda m: populations.append(m.copy()) or hill(m), 8)
    first = populations[0].tolist()
    for start in STARTS:
        assert np.clip(start, -0.25, 0.5).tolist() in first
    members = np.concatenate(populations)
    assert members.min() >= -0.25 and members.max() <= 0.5


@all_searchers
def test_the_best_is_the_best_ever_scored(kind):
    noise, seen = np.random.default_rng(0), []

    def judge(members):
        scores = [(float(x),) for x in noise.standard_normal(len(members))]
        seen.extend(zip(scores, members.tolist(), strict=True))
        return Judged(scores, np.zeros_like(members))

    found = maximise(SEARCHERS[kind](), judge, 6)
    assert (found.score, found.best.tolist()) == max(seen, key=lambda entry: entry[0])


@all_searchers
def test_a_resumed_search_equals_an_uninterrupted_one(kind, tmp_path):
    whole = maximise(SEARCHERS[kind](), hill, 7)
    file, judge = tmp_path / "runs" / "state.json", Failing(at=4)
    with pytest.raises(KeyboardInterrupt):
        maximise(SEARCHERS[kind](), judge, 7, state=file, settings={"seed": 0})
    rest = Failing(at=None)
    resumed = maximise(SEARCHERS[kind](), rest, 7, state=file, settings={"seed": 0})
    assert same(whole, resumed) and rest.calls == 7 - 3
    assert (resumed.tokens, resumed.seconds) == (whole.tokens, whole.seconds)
    again = maximise(SEARCHERS[kind](), Failing(at=1), 7, state=file, settings={"seed": 0})  # nothing is left to ask
    assert same(whole, again)


@all_searchers
def test_more_iterations_go_on_from_a_finished_search(kind, tmp_path):
    maximise(SEARCHERS[kind](), hill, 3, state=tmp_path / "s.json")
    longer = maximise(SEARCHERS[kind](), hill, 6, state=tmp_path / "s.json")
    assert same(longer, maximise(SEARCHERS[kind](), hill, 6))


def test_scores_that_are_no_numbers_survive_the_state_file(tmp_path):
    def judge(members):
        return Judged([(math.nan if m[0] > 0.5 else float(m[0]), 0.1 + 0.2) for m in members])

    whole = maximise(SEARCHERS["cem"](), judge, 5)
    maximise(SEARCHERS["cem"](), judge, 3, state=tmp_path / "s.json")
    resumed = maximise(SEARCHERS["cem"](), judge, 5, state=tmp_path / "s.json")
    assert np.array_equal(resumed.best, whole.best) and resumed.score == whole.score
    assert whole.best[0] <= 0.5 and not math.isnan(whole.score[0])


def test_the_state_file_is_whole_at_any_time(tmp_path):
    file, lengths = tmp_path / "s.json", []

    def judge(members):
        lengths.append(len(json.loads(file.read_text())["populations"]) if file.exists() else 0)
        return hill(members)

    maximise(SEARCHERS["cem"](), judge, 4, state=file)
    assert lengths == [0, 1, 2, 3] and [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_a_state_file_of_another_search_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "s.json"
    maximise(SEARCHERS["cem"](), hill, 2, state=file, settings={"seed": 0, "examples": "abc"})
    before = file.read_bytes()
    with pytest.raises(ValueError, match="of another search: examples is 'abc' there and 'xyz' here"):
        maximise(SEARCHERS["cem"](), hill, 2, state=file, settings={"seed": 0, "examples": "xyz"})
    with pytest.raises(ValueError, match="drew other numbers in population 0"):
        maximise(SEARCHERS["cem"](seed=5), hill, 2, state=file, settings={"seed": 0, "examples": "abc"})
    assert file.read_bytes() == before


def test_of_settings_that_are_named_those_are_told_that_differ(tmp_path):
    file, began = tmp_path / "s.json", {"experts": {"code": "1", "math": "2", "sums": "3"}}
    maximise(SEARCHERS["cem"](), hill, 2, state=file, settings=began)
    now = {"experts": {"code": "1", "math": "9", "new": "4", "b": "5"}}
    told = r"of another search: of its experts new: b, new; gone: sums; changed: math\. Give"
    with pytest.raises(ValueError, match=told):
        maximise(SEARCHERS["cem"](), hill, 2, state=file, settings=now)


@pytest.mark.parametrize("change", [{"format": 3}, {}], ids=["a later one", "an earlier one"])
def test_a_state_file_of_another_version_is_not_called_damaged(change, tmp_path):
    file = tmp_path / "s.json"
    maximise(SEARCHERS["cem"](), hill, 2, state=file)
    content = json.loads(file.read_text())
    del content["format"], content["populations"][0]["each"]
    file.write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=r"s\.json was written by another version .*format is [13], expected 2"):
        maximise(SEARCHERS["cem"](), hill, 2, state=file)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"settings": {}}', '{"format": 2, "settings": {}, "populations": [{}]}']
)
def test_a_damaged_state_file_is_refused(content, tmp_path):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(ValueError, match=r"search state .*s\.json .*delete it to begin anew"):
        maximise(SEARCHERS["cem"](), hill, 2, state=tmp_path / "s.json")


def test_only_the_process_that_writes_writes(tmp_path):
    maximise(SEARCHERS["cem"](), hill, 2, state=tmp_path / "s.json", writes=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "budget, populations", [({"max_tokens": 360}, 3), ({"max_seconds": 2.5}, 2), ({"max_tokens": 1}, 1), ({}, 9)]
)
def test_a_budget_is_never_exceeded_but_by_the_first_population(budget, populations, tmp_path):
    found = maximise(SEARCHERS["cem"](), hill, 9, **budget)
    assert len(found.history) == populations and found.stopped == next(iter(budget), "")
    # what an interrupted run has spent counts
    maximise(SEARCHERS["cem"](), hill, 1, state=tmp_path / "s.json")
    resumed = maximise(SEARCHERS["cem"](), hill, 9, state=tmp_path / "s.json", **budget)
    assert same(found, resumed) and resumed.stopped == found.stopped


@all_searchers
def test_later_entries_of_a_score_break_ties_of_earlier_ones(kind):
    def judge(members):
        return Judged(
            [(1.0, -float(abs(m[1] - 0.2))) for m in members], np.stack([-np.sign(m - 0.2) for m in members])
        )

    assert abs(maximise(SEARCHERS[kind](), judge, 40).best[1] - 0.2) < 0.03


def test_without_gradients_there_is_no_ascent():
    with pytest.raises(ValueError, match="needs a judge that gives gradients"):
        maximise(SEARCHERS["gradient"](), lambda m: Judged(hill(m).scores), 2)


def test_a_gradient_that_is_not_finite_moves_nothing():
    searcher = Ascent(2, start=[0.3, 0.6])
    found = maximise(searcher, lambda m: Judged([(0.0,)] * len(m), np.full_like(m, np.nan)), 3)
    assert found.best.tolist() == [0.3, 0.6] == searcher.mean.tolist()


def test_no_iterations_are_refused():
    with pytest.raises(ValueError, match="iterations=0"):
        maximise(SEARCHERS["cem"](), hill, 0)


def test_cma_says_what_it_needs(monkeypatch):
    with pytest.raises(ValueError, match='2 numbers or more, got 1: use method="cem" or "gradient"'):
        CovarianceAdaptation(1)
    with pytest.raises(ValueError, match="population of 4 or more, got 3"):
        CovarianceAdaptation(2, population=3)
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ImportError, match=r"pip install \"peft-svf\[search\]\""):
        CovarianceAdaptation(2)
