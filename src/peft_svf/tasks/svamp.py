# SPDX-License-Identifier: Apache-2.0
"""
SVAMP: one-step arithmetic word problems, some with a number that plays no part.

    prompt (choice form)     53 campers went rowing in the morning 48 campers went rowing in the afternoon and 49
                             campers went rowing in the evening. How many more campers went rowing in the morning than
                             in the evening?
    choices                  "53 - 48 = 5", "53 + 49 = 102", "53 - 49 = 4", "53 + 48 = 101"
                                                                         the right one: reward 1.0, the others -1.0

    prompt (generated form)  the problem, "Think step by step and end with: The answer is <number>."
    answer                   "4"
    completion               "53 - 49 = 4. The answer is 4."             reward 1.0; without a number -1.0

    prompt (calculation)     the problem, "Answer with the calculation."
    completion               "53 - 49 = 5"                               reward 1.0: the value of 53 - 49

The choices show how each number is made, since bare numbers leave a model of 135M parameters at chance. Problems of
two operations are in the generated form only.

The original is one set of 1000 for testing. Here it is cut into 500 train, 100 validation, 400 test. It tells the same
stories with other numbers, so problems that open with the same four words (numbers apart) stay in one split. Which one
is fixed by hashes of these words, not by the order of the file.

Source: SVAMP (Patel et al. 2021, arXiv 2103.07191). Licence: MIT.
"""

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction

from .task import HubSource, Record
from .word_problem import Calculation, WordProblem

# The share of problems of two numbers that the choice form keeps, by operation. Their four choices are the four
# operations, and unthinned half of them are subtractions: "always subtract" would be right twice as often as chance.
KEPT = {"+": 1.0, "-": 0.25, "*": 1.0, "/": 0.45}


class Svamp(WordProblem):
    """Elementary word problems; records have `id`, `question` and `answer` (a number)."""

    name = "svamp"
    description = "elementary arithmetic word problems"
    files: Mapping[str, str] = {"train": "all", "validation": "all", "test": "all"}
    hub = HubSource("ChilleD/SVAMP", None, {"all": "train+test"})

    def answer(self, raw: Record) -> Fraction:
        return Fraction(str(raw["answer"]))

    def solution(self, raw: Record) -> tuple[list[Fraction], Calculation] | None:
        """Read the field `equation`, "( 78.0 - 15.0 )", if it has one operation."""
        parts = re.fullmatch(r"\( ([\d.]+) ([-+*/]) ([\d.]+) \)", raw.get("equation", "").strip())
        return ([], (Fraction(parts[1]), parts[2], Fraction(parts[3]))) if parts else None

    def calculation(self, raw: Record) -> str | None:
        """Write the field `equation` without its outer parentheses and empty decimals."""
        equation = raw.get("equation", "").strip()
        inner = equation[1:-1] if equation.startswith("(") else equation
        return re.sub(r"\.0\b", "", inner).replace("( ", "(").replace(" )", ")").strip()

    def options(self, raw: Record, pool: Sequence[Record], rng: random.Random) -> tuple[str, list[str]] | None:
        """Leave out a part of the differences and quotients among problems of two numbers; see `KEPT`."""
        options = super().options(raw, pool, rng)
        if options is None:
            return None
        right, *_ = used = [calculation.split()[1] for calculation in (options[0], *options[1])]
        thinned = len(set(used)) == 4 and random.Random(f"svamp:{raw['id']}").random() >= KEPT[right]
        return None if thinned else options

    def cut(self, split: str, records: list[Record]) -> list[Record]:
        """Deal whole stories to the splits until each is full."""
        stories: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            words = re.sub(r"[\d,.]+", "#", record["question"].lower()).split()
            stories[" ".join(words[:4])].append(record)
        size = {"test": len(records) * 4 // 10, "validation": len(records) // 10}
        size["train"] = len(records) - sum(size.values())
        room = dict(size)
        # the largest stories first, so that the last ones fit exactly
        order = sorted(stories, key=lambda story: (-len(stories[story]), hashlib.sha256(story.encode()).hexdigest()))
        taken: list[Record] = []
        for story in order:
            # the split that is furthest from full, by its share, so that none gets only the small stories
            owner = max(room, key=lambda name: (room[name] / max(1, size[name]), name))
            room[owner] -= len(stories[story])
            if owner == split:
                taken += stories[story]
        return sorted(taken, key=lambda record: str(record["id"]))

    def from_hub(self, record: Record) -> Record:
        return {
            "id": record["ID"],
            "question": f"{record['Body'].strip()} {record['Question'].strip()}",
            "answer": float(record["Answer"]),
            "equation": record["Equation"],
        }
