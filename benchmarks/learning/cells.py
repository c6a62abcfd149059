# SPDX-License-Identifier: Apache-2.0
"""A cell of the learning benchmark: what is trained, how, on what; read from cells.json, named in results/."""

import json
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CHANGES = ("steps", "questions", "samples", "beta", "baseline")  # fields that stand in names where they are not usual


@dataclass(frozen=True)
class Cell:
    """
    One training run; method "base" is the untrained model on the test rows.

    Args:
        task (`str`): Name of the task, in its choice form.
        method (`str`): What is trained and where, such as "svf-mlp"; see `learners.adapter`.
        lr (`float`): Learning rate.
        seed (`int`): Of the order of questions, of sampled answers, of an adapter's start.
        learner (`str`): "reinforce"; "sft", next-token loss on the right answer; "evolution".
        steps, questions (`int`): Optimizer steps, and questions in each.
        samples (`int`): Answers to each question: sampled ones, or members of the population. "sft" has one.
        eval_steps (`int`): Steps between validations, which choose the checkpoint.
        test_rows (`int`): Rows of the test split at most.
        temperature (`float`): Of the policy that REINFORCE samples from; testing takes the likeliest choice at any.
        beta (`float`), baseline (`str`): Of REINFORCE: weight of KL(policy ‖ base), what rewards are compared with.
    """

    task: str
    method: str
    lr: float = 0.0
    seed: int = 0
    learner: str = "reinforce"
    steps: int = 30
    questions: int = 16
    samples: int = 16
    eval_steps: int = 10
    test_rows: int = 1000
    temperature: float = 1.0
    beta: float = 0.0
    baseline: str = "rloo"

    @property
    def setting(self) -> tuple[float, float]:
        """What validation chooses for a kind: learning rate and temperature."""
        return self.lr, self.temperature

    @property
    def kind(self) -> str:
        """What the cell compares: learner, method, budget and penalty, whatever setting and seed."""
        learner = "" if self.learner == "reinforce" else f"{self.learner}-"
        budget = "".join(
            f"-{name}{getattr(self, name)}" for name in CHANGES if getattr(self, name) != getattr(Cell, name)
        )
        return learner + self.method + budget

    @property
    def name(self) -> str:
        if self.method == "base":
            return f"{self.task}-base"
        warm = f"-t{self.temperature:g}" if self.temperature != 1 else ""
        return f"{self.task}-{self.kind}-lr{self.lr:g}-seed{self.seed}{warm}"


def read_cells() -> list[Cell]:
    """The cells of cells.json, in the order in which they are run."""
    return [Cell(**entry) for entry in json.loads((HERE / "cells.json").read_text())]
