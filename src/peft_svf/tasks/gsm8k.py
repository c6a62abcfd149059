# SPDX-License-Identifier: Apache-2.0
"""
GSM8K: grade-school maths problems of two to eight steps.

    prompt (choice form)     Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in
                             May. How many clips did Natalia sell altogether in April and May?
    choices                  "24 / 2 = 12", "48 / 24 = 2", "24 + 2 = 26", "48 + 24 = 72"
                                                                         the right one: reward 1.0, the others -1.0

    prompt (generated form)  the problem, "Think step by step and end with: The answer is <number>."
    answer                   "72"
    completion               "48/2 = 24 and 48 + 24 = 72. #### 72"       reward 1.0; without a number -1.0

The choices are last steps; they may use results of the steps before. Solutions that end otherwise than in one
operation on two whole numbers are in the generated form only.

Splits as in the paper (arXiv 2501.06252): even rows of the published train set are train, odd rows validation; test is
the published one.

Source: GSM8K (Cobbe et al. 2021, arXiv 2110.14168). Licence: MIT.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from .task import HubSource, Record, form_of
from .word_problem import TOKEN, Calculation, WordProblem, numbers_in

LONGEST = 40  # characters of a calculation that a row asks for: about 16 tokens


class Gsm8k(WordProblem):
    """Grade-school problems; records have `question` and `answer`, a solution with `<<a+b=c>>` and a last `#### n`."""

    name = "gsm8k"
    description = "grade-school maths word problems of several steps"
    files: Mapping[str, str] = {"train": "train", "validation": "train", "test": "test"}
    hub = HubSource("openai/gsm8k", "main", {"train": "train", "test": "test"})

    def answer(self, raw: Record) -> Fraction:
        return numbers_in(raw["answer"].rsplit("####", 1)[1])[0]

    def solution(self, raw: Record) -> tuple[list[Fraction], Calculation] | None:
        """Read the calculator annotations: the last is the calculation, the others give the results before it."""
        annotations = re.findall(r"<<([^<>=]*)=([^<>=]*)>>", raw["answer"])
        if not annotations or numbers_in(annotations[-1][1]) != [self.answer(raw)]:
            return None
        parts = re.fullmatch(r"([\d.]+)([-+*/])([\d.]+)", annotations[-1][0].replace(" ", ""))
        steps = [value for _, result in annotations[:-1] for value in numbers_in(result)]
        return (steps, (Fraction(parts[1]), parts[2], Fraction(parts[3]))) if parts else None

    def calculation(self, raw: Record) -> str | None:
        """Put the calculations of the steps before into the last one, each for its result."""
        steps: dict[str, str] = {}
        text = None
        for calculation, result in re.findall(r"<<([^<>=]*)=([^<>=]*)>>", raw["answer"]):
            parts = [f"({steps[part]})" if part in steps else part for part in TOKEN.findall(calculation)]
            text = steps[result.strip()] = " ".join(parts).replace("( ", "(").replace(" )", ")")
        return text if text and len(text) <= LONGEST else None

    def solved(self, raw: Record, row: Mapping[str, Any]) -> str:
        if form_of(row) != "generate":
            return super().solved(raw, row)
        steps = re.sub(r"<<[^<>]*>>", "", raw["answer"].rsplit("####", 1)[0]).strip()
        return f"{steps}\nThe answer is {row['answer']}."

    def cut(self, split: str, records: list[Record]) -> list[Record]:
        return {"train": records[::2], "validation": records[1::2]}.get(split, records)
