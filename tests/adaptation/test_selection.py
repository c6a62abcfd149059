# SPDX-License-Identifier: Apache-2.0
"""Laws of the benchmark of choosing by a few examples: it scores, chooses and checks as the library does."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "adaptation"))

import selection

from peft_svf.adaptation.judge import Weights

WEIGHTS = Weights(selection.EXPERTS)


def result(logps, labels):
    return {"mixtures": selection.MIXTURES.tolist(), "labels": labels, "logps": logps}


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    monkeypatch.setattr(selection, "DRAWS", 100)


@pytest.fixture
def drawn():
    """Log-likelihoods of 3 or 4 choices of 30 rows under each mixture, and what is right."""
    draws = np.random.default_rng(0)
    sizes = draws.integers(3, 5, 30)
    logps = [[draws.normal(-20, 5, size).tolist() for size in sizes] for _ in selection.MIXTURES]
    return result(logps, [int(draws.integers(size)) for size in sizes])


@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_the_right_choice_is_scored_by_the_softmax_at_a_temperature(drawn, temperature):
    found = selection.right_logps(drawn["logps"], np.asarray(drawn["labels"]), temperature)
    for mixture, rows in zip(found, drawn["logps"], strict=True):
        for value, row, label in zip(mixture, rows, drawn["labels"], strict=True):
            expected = torch.tensor(row, dtype=torch.float64).div(temperature).log_softmax(0)[label]
            assert value == pytest.approx(float(expected))


def test_unchecked_the_best_of_the_examples_is_chosen_by_right_answers_then_likelihood(drawn):
    labels = np.asarray(drawn["labels"])
    each = np.stack([selection.right_of(drawn), selection.right_logps(drawn["logps"], labels, 8.0)], -1)
    for seed in range(5):
        rows = np.random.default_rng(seed).permutation(30)[:5]
        best = max(range(len(each)), key=lambda c: tuple(each[c, rows].mean(0)))
        assert selection.choose(each, rows, 0, selection.MIXTURES, WEIGHTS) == best


def test_a_mixture_that_is_better_on_every_row_is_chosen_and_its_gain_is_told(drawn):
    better = 5
    for label, row in zip(drawn["labels"], drawn["logps"][better], strict=True):
        row[label] = 0.0
    base = drawn["logps"][0]
    for label, row in zip(drawn["labels"], base, strict=True):
        row[label] = -99.0
    for (check, _, count), entry in selection.compare(drawn).items():
        assert entry["gain"] == 1 and entry["worse"] == 0 == entry["base"], (check, count)


def test_where_nobody_is_better_leaving_one_out_ends_with_the_base_more_often_than_no_check(drawn):
    found = selection.compare(drawn)
    for count in (5, 10, 20):
        assert found["leave-one-out", 8.0, count]["base"] > found["0", 8.0, count]["base"] + 0.1
