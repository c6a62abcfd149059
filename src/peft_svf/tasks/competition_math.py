# SPDX-License-Identifier: Apache-2.0
r"""
MATH: competition problems whose answer is a formula.

    prompt (choice form)     What is the positive difference between $120\%$ of 30 and $130\%$ of 20?
    choices                  "24", "10", "64", "18"                      the right one: reward 1.0, the others -1.0

    prompt (generated form)  the problem, "Think step by step and put the answer into \boxed{}."
    answer                   "\frac{1}{2}"
    completion               "... so it is \boxed{0.5}."                  reward 1.0; without a formula -1.0

In the generated form `math-verify` (extra `eval`) compares formulas by value, in the main thread, as it limits its
time by a signal. In the choice form the wrong answers come from other problems of the split and have the same shape,
digit for digit; they are drawn as often as they occur, so that length and frequency give little away. Answers whose
shape occurs less than four times are in the generated form only.

Splits: test is MATH-500 (Lightman et al. 2023, arXiv 2305.20050). The 4500 problems of the published test set outside
it are for training and adaptation: by a hash of the problem 1 in 10 is validation, the others train.

Source: MATH (Hendrycks et al. 2021, arXiv 2103.03874). Licence: MIT.
"""

import functools
import hashlib
import random
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ..files import extra
from .task import Folder, HubSource, Record, Task

LONGEST = 400  # characters of a formula that is compared; the longest published answer has 159
SECONDS = 3  # until reading or comparing a formula stops
# Spellings that print the same must not distinguish two answers.
_SPELLINGS = {r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\left": "", r"\right": "", r"\!": "", r"\,": "", " ": ""}


class Math(Task):
    """Competition problems; records have `problem`, `solution` and `answer`, the content of its last box."""

    name = "math"
    kind = "math"
    description = "competition mathematics"
    published_names = True  # "test.jsonl.gz" is the published test set, which contains MATH-500
    files: Mapping[str, str] = {"train": "test", "validation": "test", "test": "math500"}
    hub = HubSource("nlile/hendrycks-MATH-benchmark", None, {"test": "train", "math500": "test"})

    def load(self, split: str, folder: Folder = None) -> list[Record]:
        """Load a split; train and validation need MATH-500, too, as their file holds its problems."""
        if split in self.files:
            self._records("test", folder)
        return super().load(split, folder)

    def cut(self, split: str, records: list[Record]) -> list[Record]:
        """Deal the published test set by the problems' hashes; MATH-500 is taken out in [`Task.load`]."""
        if split == "test":
            return records
        # The Hub has the published train set in the same file.
        records = [record for record in records if not str(record.get("unique_id", "")).startswith("train/")]
        validation = split == "validation"
        return [record for record in records if (int(record["id"].rsplit("-", 1)[1], 16) % 10 == 0) == validation]

    def identify(self, record: Record, place: str) -> str:
        """Return a hash of the problem: the same in either file and on the Hub."""
        return f"math-{hashlib.sha256(record['problem'].encode()).hexdigest()[:12]}"

    def question(self, raw: Record) -> str:
        return raw["problem"]

    def options(self, raw: Record, pool: Sequence[Record], rng: random.Random) -> tuple[str, list[str]] | None:
        right, shape = _printed(raw["answer"])
        alike = [text for text, other in (_printed(record["answer"]) for record in pool) if other == shape]
        rng.shuffle(alike)  # keeps repetitions: frequent answers must be wrong choices as often as right choices
        wrong = [text for text in dict.fromkeys(alike) if text != right][:3]
        return (right, wrong) if len(wrong) == 3 else None

    def row(self, raw: Record) -> Record:
        text = f"{raw['problem']}\nThink step by step and put the answer into \\boxed{{}}."
        return self.ask(raw, text, answer=raw["answer"])

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """Compare the last boxed formula, without a box the last formula, by value; the bare answer is right, too."""
        if completion.strip() == row["answer"]:
            return 1.0
        boxes = boxed(completion)
        text = f"\\boxed{{{boxes[-1]}}}" if boxes else " ".join(completion.split())[-LONGEST:]
        return float(len(text) <= LONGEST + 8 and same_value(text, f"\\boxed{{{row['answer']}}}"))


def boxed(text: str) -> list[str]:
    r"""Return the contents of every outermost `\boxed{...}` with matching braces, in one pass over the text."""
    contents, starts, depth = [], list[tuple[int, int]](), 0
    for token in re.finditer(r"\\boxed\s?\{|\\[{}]|[{}]", text):
        if token[0] == "}":
            depth -= 1
            if starts and starts[-1][1] > depth:
                begin, _ = starts.pop()
                if not starts:
                    contents.append(text[begin : token.start()])
        elif token[0][0] != "\\" or token[0][1] == "b":
            depth += 1
            if token[0][0] == "\\":
                starts.append((token.end(), depth))
    return contents


def same_value(text: str, solution: str) -> bool:
    """Compare the last formulas of a completion and of a solution, in boxes or between dollar signs, by value."""
    with extra("eval", "Task 'math' compares formulas by math-verify"):
        from math_verify import parse, verify  # type: ignore[import-untyped, unused-ignore]
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "Task 'math' scores generated answers in the main thread only: `math-verify` stops a formula after "
            f"{SECONDS} s by a signal, and would count every answer as wrong here. Use the choice form."
        )
    right, answer = (parse(formula, parsing_timeout=SECONDS) for formula in (solution, text))
    return bool(right and answer and verify(right, answer, timeout_seconds=SECONDS))


@functools.lru_cache(maxsize=8192)
def _printed(answer: str) -> tuple[str, str]:
    """Return an answer in the common spelling, and its shape: the same with every digit a 9."""
    for spelling, common in _SPELLINGS.items():
        answer = answer.replace(spelling, common)
    return answer, re.sub(r"\d", "9", answer)
