# SPDX-License-Identifier: Apache-2.0
"""
What word problems share: the number an answer ends with, its calculation, and wrong numbers that look right.

A completion becomes a `Fraction`, and a calculation becomes three distractors of the problem's own numbers. In the
form "calculation" the answer is "8 + 3", graded by its value. All arithmetic is exact.
"""

import operator
import random
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from .task import FORMS, Record, Task, form_of

Calculation = tuple[Fraction, str, Fraction]  # a, one of "+-*/", b

_NUMBER = re.compile(r"(?<![\w.])(-?)\s?\$?(\d[\d,]*(?:\.\d+)?|\.\d+)")
_STATED = re.compile(r"(?:####|answer\s+is)[\s:*]*(-?\s?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+))", re.IGNORECASE)
_DIGITS = 64  # that count in a number: no answer has more, and exact arithmetic on thousands of them is slow
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
TOKEN = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+|[-+*/()]")
_SPELLED = str.maketrans("×x÷−", "**/-")
_EXACT = {**_OPERATIONS, "/": operator.truediv}
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_VALUES = {word: value for value, word in enumerate(_WORDS, 1)} | {"half": 2, "twice": 2, "double": 2, "dozen": 12}


class WordProblem(Task):
    """A problem whose answer is one number; a subclass reads the number and the steps of the solution."""

    kind = "math"
    forms = (*FORMS, "calculation")

    @abstractmethod
    def answer(self, raw: Record) -> Fraction:
        """Read the right number out of a record."""

    @abstractmethod
    def solution(self, raw: Record) -> tuple[list[Fraction], Calculation] | None:
        """Read the last calculation out of a record, and the results before it; `None` if it isn't `a op b`."""

    @abstractmethod
    def calculation(self, raw: Record) -> str | None:
        """Write all of the solution as one calculation, "(6 * 12) - 30"; `None` if the record has none."""

    def options(self, raw: Record, pool: Sequence[Record], rng: random.Random) -> tuple[str, list[str]] | None:
        """Return the calculation with the right result and three with others, made from the same numbers."""
        solution = self.solution(raw)
        if solution is None:
            return None
        steps, right = solution
        words = re.findall(r"[a-z]+", raw["question"].lower())
        numbers = numbers_in(raw["question"]) + [Fraction(_VALUES[word]) for word in words if word in _VALUES]
        made = calculations(right, numbers, steps, rng)
        return made if made and final_number(made[0]) == self.answer(raw) else None

    def row(self, raw: Record) -> Record:
        text = f"{raw['question']}\nThink step by step and end with: The answer is <number>."
        return self.ask(raw, text, answer=printed(self.answer(raw)))

    def make_row(self, raw: Record, form: str, pool: Sequence[Record] = (), seed: int = 0) -> Record | None:
        """Make a row; the form "calculation" leaves out records whose calculation doesn't give the answer."""
        if form != "calculation":
            return super().make_row(raw, form, pool, seed)
        text, answer = self.calculation(raw), self.answer(raw)
        if text is None or calculated(text) != answer:
            return None
        question = f"{raw['question']}\nAnswer with the calculation."
        return self.ask(raw, question, answer=printed(answer), calculation=text, form=form)

    def solved(self, raw: Record, row: Mapping[str, Any]) -> str:
        """Write the calculation, or a solution that ends as the generated form asks for."""
        form = form_of(row)
        if form == "generate":
            worked, last = self.calculation(raw), f"The answer is {row['answer']}."
            return f"{worked} = {row['answer']}. {last}" if worked else last
        return row["calculation"] if form == "calculation" else super().solved(raw, row)

    def grade(self, completion: str, row: Mapping[str, Any]) -> float:
        if form_of(row) != "calculation":
            return super().grade(completion, row)
        value = calculated(completion)
        return float(value is not None and printed(value) == row["answer"])

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """Compare the number that the completion ends with, by value."""
        return float(final_number(completion) == final_number(str(row["answer"])))


def numbers_in(text: str) -> list[Fraction]:
    """Read the numbers that a text writes in digits, in order: commas and decimals, without currency signs."""
    return [_value(sign, digits) for sign, digits in _NUMBER.findall(text)]


def final_number(text: str) -> Fraction | None:
    """Read the answer out of a completion: after the last "####" or "answer is", else its last number."""
    stated = _STATED.findall(text)
    numbers = numbers_in(stated[-1] if stated else text)
    return numbers[-1] if numbers else None


def calculated(text: str) -> Fraction | None:
    """
    Compute the calculation that a text begins with: its first line, up to "=".

    It has at most 40 numbers, parentheses and + - * / (also × x ÷), so that reading it takes no time to speak of.
    `None` if the line is anything else, or divides by 0.
    """
    line = text.lstrip()[:400].partition("\n")[0].partition("=")[0].translate(_SPELLED).strip().rstrip(".")
    tokens = TOKEN.findall(line)[::-1]
    if len(tokens) > 40 or "".join(reversed(tokens)) != re.sub(r"[\s$]", "", line):
        return None
    try:
        value = _computed(tokens)
    except (IndexError, ValueError, ZeroDivisionError):  # it ends early, a sign is out of place
        return None
    return None if tokens else value


def _computed(tokens: list[str], rank: int = 0) -> Fraction:
    """Take a sum (rank 0), a product (1) or a factor (2) from the end of reversed tokens."""
    if rank == 2:
        match tokens.pop():
            case "-":
                return -_computed(tokens, 2)
            case "(":
                value = _computed(tokens)
                if tokens.pop() != ")":
                    raise ValueError("a parenthesis isn't closed")
                return value
            case number:
                return _value("", number)
    value = _computed(tokens, rank + 1)
    while tokens and tokens[-1] in ("+-", "*/")[rank]:
        sign = tokens.pop()
        value = _EXACT[sign](value, _computed(tokens, rank + 1))
    return value


def printed(number: Fraction) -> str:
    """Write a number as the benchmarks do: whole ones without a point, others with two decimals."""
    return str(number.numerator) if number.denominator == 1 else f"{float(number):.2f}"


def calculations(
    right: Calculation, numbers: Sequence[Fraction], steps: Sequence[Fraction], rng: random.Random
) -> tuple[str, list[str]] | None:
    """
    Make three wrong calculations that look like the right one.

    The four are two operations on two pairs of numbers if a third number is at hand, so that neither the most frequent
    operation nor the most frequent pair is right; else they are the four operations on the one pair. A number of the
    problem is exchanged for another of the problem, a result for another result: "not in the problem" is no hint. The
    larger number comes first in all, and quotients are rounded down, as only the right one is sure to come out even.

    Args:
        right (`(a, operation, b)`): The calculation that solves the problem.
        numbers, steps (sequences of `Fraction`): The numbers of the problem, and the results of the steps before.
        rng (`random.Random`): Draws the other operation and the other pair.

    Returns:
        The right one and the three others as texts, "78 - 15 = 63"; `None` if a number in them isn't whole, if two
        give the same result, or if one gives 0.
    """
    a, operation, b = right
    pair = (max(a, b), min(a, b))
    if (operation in "-/" and pair != (a, b)) or (operation == "/" and (b == 0 or a % b)):
        return None
    exchanges = []
    for kept, replaced in (pair, pair[::-1]):
        others = numbers if replaced in numbers else [step for step in steps if step not in numbers]
        exchanges += [(kept, n) for n in dict.fromkeys(others) if n > 1 and n.denominator == 1 and n not in pair]
    if exchanges:
        kept, third = rng.choice(exchanges)
        symbols = [operation, rng.choice([symbol for symbol in _OPERATIONS if symbol != operation])]
        pairs = [pair, (max(kept, third), min(kept, third))]
    else:
        symbols = sorted(_OPERATIONS, key=lambda symbol: symbol != operation)
        pairs = [pair]
    grid = [(high, low, symbol) for symbol in symbols for high, low in pairs]
    if any(low < 1 or low.denominator != 1 or high.denominator != 1 for high, low, _ in grid):
        return None
    results = [_OPERATIONS[symbol](high, low) for high, low, symbol in grid]
    if len(set(results)) < 4 or min(results) < 1:
        return None
    texts = [f"{high} {symbol} {low} = {result}" for (high, low, symbol), result in zip(grid, results, strict=True)]
    return texts[0], texts[1:]


def _value(sign: str, digits: str) -> Fraction:
    whole, _, part = digits.replace(",", "").lstrip("0").partition(".")
    longer = min(len(whole[_DIGITS:]), 1000)  # further digits count as zeros
    value = Fraction(f"{whole[:_DIGITS] or 0}.{part[:_DIGITS] or 0}") * 10**longer
    return -value if sign else value
