# SPDX-License-Identifier: Apache-2.0
"""
How well can a few examples choose a mixture, and what should check the choice? Hundreds of draws of examples each.

    python benchmarks/adaptation/selection.py --minutes 30

A search that ends after minutes answers this for one draw of examples. Here a cell scores every row of a task once
under each of 13 mixtures (base, experts, halves, sums); then any number of draws of 3 to 20 examples can choose among
these 13 by any rule, and the other rows tell what the choice was worth. `report.py` does that by `compare`, with the
library's own checks.
"""

import argparse
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from common import BATCH, EXPERTS, Cell, arguments, load, parse, questions, run_cells
from few_shot import TASKS

from peft_svf import Mixture
from peft_svf.adaptation.few_shot import LEAVE_ONE_OUT, check_choice
from peft_svf.adaptation.judge import Weights
from peft_svf.adaptation.search import Found, Judged
from peft_svf.evaluation import choice_logps

SHOTS, DRAWS = (3, 5, 10, 20), 400
TEMPERATURES = (1.0, 4.0, 8.0, 16.0)
SINGLE = np.eye(len(EXPERTS))
MIXTURES = np.concatenate(
    [
        [np.zeros(3)], SINGLE, [np.full(3, 1 / 3)], SINGLE / 2,
        [(SINGLE[i] + SINGLE[j]) / 2 for i, j in ((0, 1), (0, 2), (1, 2))],
        [SINGLE[0] + SINGLE[1], SINGLE[0] + SINGLE[2]],
    ]
)  # fmt: skip
POOL = {"svamp": 200, "arc_challenge": 200, "math": 200}  # rows that examples are drawn from and choices tested on


def grid(task: str, args: argparse.Namespace) -> dict[str, Any]:
    """Log-likelihoods of the choices of each row under each mixture, `(mixtures, rows, choices)`."""
    rows, model, found = questions(task, POOL[task], args), load(), []
    order = sorted(range(len(rows)), key=lambda i: len(str(rows[i]["prompt"])))
    for alpha in MIXTURES.tolist():
        logps: dict[int, list[float]] = {}
        with model.using(Mixture(dict(zip(EXPERTS, alpha, strict=True)))) as active, torch.no_grad():
            for start in range(0, len(order), BATCH):
                places = order[start : start + BATCH]
                scored = choice_logps(active, model.tokenizer, [rows[i] for i in places])
                logps |= dict(zip(places, scored.double().tolist(), strict=True))
        found.append([[round(x, 3) for x in logps[i][: len(rows[i]["choices"])]] for i in range(len(rows))])
    labels = [row["label"] for row in rows]
    return {"task": task, "mixtures": MIXTURES.tolist(), "labels": labels, "logps": found}


def compare(result: Mapping[str, Any], seed: int = 0) -> dict[tuple[str, float, int], dict[str, float]]:
    """
    Let draws of examples choose among the mixtures of a cell, by each check and temperature.

    Returns:
        By check, temperature and number of examples: the mean `gain` on the base over the rows that were not drawn,
        its 10 % quantile `low`, the share of draws that are `worse` than the base and of those that end with `base`.
    """
    mixtures, labels, right = np.asarray(result["mixtures"]), np.asarray(result["labels"]), right_of(result)
    weights, found = Weights(EXPERTS), {}
    logging.getLogger("peft_svf.adaptation.few_shot").setLevel(
        logging.ERROR
    )  # a check that gives up warns, hundreds of times
    for temperature in TEMPERATURES:
        each = np.stack([right, right_logps(result["logps"], labels, temperature)], -1)  # (mixtures, rows, 2)
        for count in SHOTS:
            draws = np.random.default_rng(seed)
            orders = [draws.permutation(len(labels)) for _ in range(DRAWS)]
            for check in (LEAVE_ONE_OUT, 0):
                chosen = [choose(each, order[:count], check, mixtures, weights) for order in orders]
                gains = np.asarray(
                    [(right[c] - right[0])[order[count:]].mean() for c, order in zip(chosen, orders, strict=True)]
                )
                found[str(check), temperature, count] = {
                    "gain": gains.mean(), "low": np.quantile(gains, 0.1), "worse": (gains < 0).mean(),
                    "base": np.mean([c == 0 for c in chosen]),
                }  # fmt: skip
    return found


def right_of(result: Mapping[str, Any]) -> np.ndarray:
    """Whether each mixture answers each row right, `(mixtures, rows)`."""
    pairs = [zip(rows, result["labels"], strict=True) for rows in result["logps"]]
    return np.asarray([[int(np.argmax(row) == label) for row, label in each] for each in pairs])


def best(result: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy over all rows of the base and of the best mixture."""
    accuracy = right_of(result).mean(1)
    return {"base": float(accuracy[0]), "best": float(accuracy.max())}


def choose(each: np.ndarray, drawn: np.ndarray, check: Any, mixtures: np.ndarray, weights: Weights) -> int:
    """The mixture that examples choose, after a check: what `few_shot` does where a search finds the best of 13."""

    def judge(rows: np.ndarray) -> Callable[[np.ndarray], Judged]:
        def scores(members: np.ndarray) -> Judged:
            places = [int((mixtures == member).all(1).argmax()) for member in members]
            return Judged(each[np.ix_(places, rows)])

        return scores

    told = judge(drawn)(mixtures)
    best = max(range(len(mixtures)), key=lambda c: told.scores[c])
    vector = mixtures[best]
    if check == LEAVE_ONE_OUT:
        searched = Found(vector, mixtures, told.by_example, told.scores[best])
        vector, _, _ = check_choice(weights, searched, judge(drawn))
    return int((mixtures == vector).all(1).argmax())


def right_logps(logps: list[list[list[float]]], labels: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probability of the right choice under the softmax over all, `(mixtures, rows)`."""

    def of(row: list[float], label: int) -> float:
        scaled = np.asarray(row) / temperature
        return float(scaled[label] - np.logaddexp.reduce(scaled))

    return np.asarray([[of(row, label) for row, label in zip(rows, labels, strict=True)] for rows in logps])


def cells(args: argparse.Namespace) -> list[Cell]:
    return [Cell(f"selection-{task}", functools.partial(grid, task, args)) for task in POOL if task in TASKS]


if __name__ == "__main__":
    args = parse(arguments(__doc__))
    run_cells(cells(args), args)
