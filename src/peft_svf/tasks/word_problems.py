# SPDX-License-Identifier: Apache-2.0
"""
Word problems, whose answer is one number: GSM8K (two to eight steps) and SVAMP (one, some with an idle number).

    prompt (choice form)     53 campers went rowing in the morning 48 campers went rowing in the afternoon and 49
                             campers went rowing in the evening. How many more campers went rowing in the morning than
                             in the evening?
    choices                  "53 - 48 = 5", "53 + 49 = 102", "53 - 49 = 4", "53 + 48 = 101"
                                                                         the right one: reward 1.0, the others -1.0

    prompt (generated form)  the problem, "Think step by step and end with: The answer is <number>."
    completion               "53 - 49 = 4. The answer is 4."             reward 1.0; without a number -1.0

    prompt (calculation)     the problem, "Answer with the calculation."
    completion               "53 - 49 = 5"                               reward 1.0: the value of 53 - 49

The choices show how each number is computed, since bare numbers leave a model of 135M parameters at chance. In GSM8K
they are the last step, which may use results of earlier steps. A problem that doesn't end in one operation on two
whole numbers is in the other forms only. All arithmetic is exact.

Sources: GSM8K (Cobbe et al. 2021, arXiv 2110.14168), SVAMP (Patel et al. 2021, arXiv 2103.07191). Licence: MIT, both.
"""

import ast
import hashlib
import operator
import random
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from .task import FORMS, HubSource, Record, Task, form_of

Calculation = tuple[Fraction, str, Fraction]  # a, one of "+-*/", b

_NUMBER = re.compile(r"(?<![\w.])(-?)\s?\$?(\d[\d,]*(?:\.\d+)?|\.\d+)")
_STATED = re.compile(r"(?:####|answer\s+is)[\s:*]*(-?\s?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+))", re.IGNORECASE)
_DIGITS = 64  # that count in a number: no answer has more, and exact arithmetic on thousands of them is slow
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
_TOKEN = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+|[-+*/()]")
_SPELLED = str.maketrans("×x÷−", "**/-")
_EXACT = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_VALUES = {word: value for value, word in enumerate(_WORDS, 1)} | {"half": 2, "twice": 2, "double": 2, "dozen": 12}
_STEP = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")  # an annotation of GSM8K
_LONGEST = 40  # characters of a calculation of GSM8K that a row asks for: about 16 tokens
# The share of SVAMP's problems of two numbers that the choice form keeps, by operation. Their choices are the four
# operations, and unthinned half of them are subtractions: "always subtract" would be right twice as often as chance.
_KEPT = {"+": 1.0, "-": 0.25, "*": 1.0, "/": 0.45}


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


class Gsm8k(WordProblem):
    """
    GSM8K; records have `question` and `answer`, a solution with annotations `<<a+b=c>>` and a last `#### n`.

    Splits as in the paper (arXiv 2501.06252): even rows of the published train set are train, odd rows validation.
    """

    name = "gsm8k"
    description = "grade-school maths word problems of several steps"
    files: Mapping[str, str] = {"train": "train", "validation": "train", "test": "test"}
    hub = HubSource("openai/gsm8k", "main", {"train": "train", "test": "test"})

    def answer(self, raw: Record) -> Fraction:
        return numbers_in(raw["answer"].rsplit("####", 1)[1])[0]

    def solution(self, raw: Record) -> tuple[list[Fraction], Calculation] | None:
        """Read the calculator annotations: the last is the calculation, the others give the results before it."""
        annotations = _STEP.findall(raw["answer"])
        if not annotations or numbers_in(annotations[-1][1]) != [self.answer(raw)]:
            return None
        parts = re.fullmatch(r"([\d.]+)([-+*/])([\d.]+)", annotations[-1][0].replace(" ", ""))
        steps = [value for _, result in annotations[:-1] for value in numbers_in(result)]
        return (steps, (Fraction(parts[1]), parts[2], Fraction(parts[3]))) if parts else None

    def calculation(self, raw: Record) -> str | None:
        """Put the calculations of the steps before into the last one, each for its result."""
        steps: dict[str, str] = {}
        text = None
        for calculation, result in _STEP.findall(raw["answer"]):
            parts = [f"({steps[part]})" if part in steps else part for part in _TOKEN.findall(calculation)]
            text = steps[result.strip()] = " ".join(parts).replace("( ", "(").replace(" )", ")")
        return text if text and len(text) <= _LONGEST else None

    def solved(self, raw: Record, row: Mapping[str, Any]) -> str:
        if form_of(row) != "generate":
            return super().solved(raw, row)
        steps = re.sub(r"<<[^<>]*>>", "", raw["answer"].rsplit("####", 1)[0]).strip()
        return f"{steps}\nThe answer is {row['answer']}."

    def cut(self, split: str, records: list[Record]) -> list[Record]:
        return {"train": records[::2], "validation": records[1::2]}.get(split, records)


class Svamp(WordProblem):
    """
    SVAMP; records have `id`, `question`, `answer` (a number) and `equation`, "( 78.0 - 15.0 )".

    The original is one set of 1000 for testing. Here it is cut into 500 train, 100 validation, 400 test. It tells the
    same stories with other numbers, so problems that open with the same four words (numbers apart) stay in one split;
    which one is fixed by hashes of these words, not by the order of the file.
    """

    name = "svamp"
    description = "elementary arithmetic word problems"
    files: Mapping[str, str] = {"train": "all", "validation": "all", "test": "all"}
    hub = HubSource("ChilleD/SVAMP", None, {"all": "train+test"})

    def answer(self, raw: Record) -> Fraction:
        return Fraction(str(raw["answer"]))

    def solution(self, raw: Record) -> tuple[list[Fraction], Calculation] | None:
        """Read the field `equation`, if it has one operation."""
        parts = re.fullmatch(r"\( ([\d.]+) ([-+*/]) ([\d.]+) \)", raw.get("equation", "").strip())
        return ([], (Fraction(parts[1]), parts[2], Fraction(parts[3]))) if parts else None

    def calculation(self, raw: Record) -> str | None:
        """Write the field `equation` without its outer parentheses and empty decimals."""
        equation = raw.get("equation", "").strip()
        inner = equation[1:-1] if equation.startswith("(") else equation
        return re.sub(r"\.0\b", "", inner).replace("( ", "(").replace(" )", ")").strip()

    def options(self, raw: Record, pool: Sequence[Record], rng: random.Random) -> tuple[str, list[str]] | None:
        """Leave out a part of the differences and quotients among problems of two numbers; see `_KEPT`."""
        options = super().options(raw, pool, rng)
        if options is None:
            return None
        right, *_ = used = [calculation.split()[1] for calculation in (options[0], *options[1])]
        thinned = len(set(used)) == 4 and random.Random(f"svamp:{raw['id']}").random() >= _KEPT[right]
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
    tokens = _TOKEN.findall(line)
    if len(tokens) > 40 or "".join(tokens) != re.sub(r"[\s$]", "", line):
        return None
    numbers = [_value("", token) for token in tokens if token not in "+-*/()"]
    skeleton = " ".join(token if token in "+-*/()" else "n" for token in tokens)  # "( n + n ) / n"
    try:
        return _computed(ast.parse(skeleton, mode="eval").body, iter(numbers))
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _computed(node: ast.expr, numbers: Iterator[Fraction]) -> Fraction:
    """Compute a tree whose names stand for the next number each, from left to right."""
    match node:
        case ast.Name():
            return next(numbers)
        case ast.UnaryOp(op=ast.USub()):
            return -_computed(node.operand, numbers)
        case ast.BinOp():
            left = _computed(node.left, numbers)
            return _EXACT[type(node.op)](left, _computed(node.right, numbers))
    raise ValueError("neither a number nor one of the four operations")


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
    problem is replaced by another number of the problem, and a result by another result, so "not in the problem" isn't
    a hint. The larger number always comes first, and quotients are rounded down, as only the right one is sure to be
    whole.

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
