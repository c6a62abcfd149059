# SPDX-License-Identifier: Apache-2.0
"""
What programming problems share: programs printed in one style, wrong ones that look alike, a run in the sandbox.

A published program gets a neutral name and, as distractors, three programs of other problems about as long; the
problem's asserts grade a completion.
"""

import ast
import functools
import random
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from .sandbox import run_python
from .task import Record, Task, form_of

ENTRY, HELPER = "solve", "helper"
_BLOCK = re.compile(r"```(?:[ \t]*(?:python|py))?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_CALLED = re.compile(r"\b([A-Za-z_]\w*)\s*\(")


class CodeTask(Task):
    """A problem that a program solves; subclasses read question, program and asserts."""

    kind = "code"
    max_characters = 300  # limit of a program in the choice form

    @abstractmethod
    def source(self, raw: Record) -> tuple[str, dict[str, str]] | None:
        """Read a record's program, and its names that would give the answer away, each with a neutral one."""

    def options(self, raw: Record, pool: Sequence[Record], rng: random.Random) -> tuple[str, list[str]] | None:
        """Return the record's program and three of other problems that are about as long."""
        right = self.program(raw)
        if right is None:
            return None
        question = self.question(raw)
        programs = {self.program(other) for other in pool if not _alike(question, self.question(other))}
        others = {code for code in programs if code is not None and code != right}

        def distance(code: str) -> tuple[int, str]:
            # A line counts as ten characters, so that the programs of a row look equally long on the page. The code
            # settles ties, so that the order of the file doesn't matter.
            return abs(len(code) - len(right)) + 10 * abs(code.count("\n") - right.count("\n")), code

        ranked = sorted(others, key=distance)
        below = [code for code in ranked if len(code) <= len(right)][:8]
        above = [code for code in ranked if len(code) > len(right)][:8]
        if len(below) + len(above) < 3:
            return None
        # The rank among the four lengths is drawn first, as no rank may be the better guess.
        shorter = max(min(rng.randrange(4), len(below)), 3 - len(above))
        return right, rng.sample(below, shorter) + rng.sample(above, 3 - shorter)

    def program(self, raw: Record) -> str | None:
        """Print a record's program in one style under neutral names; `None` if it's too long or isn't Python 3."""
        source = self.source(raw)
        text = source and printed_program(source[0], tuple(source[1].items()))
        return text if text and len(text) <= self.max_characters else None

    def solved(self, raw: Record, row: Mapping[str, Any]) -> str:
        answer = super().solved(raw, row)
        return f"```python\n{answer.strip()}\n```" if form_of(row) == "generate" else answer

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """Run the first code block, or the whole text if it has none, against the asserts in the sandbox."""
        asserts = [*filter(None, [row.get("setup")]), *row["tests"]]
        return float(run_python(code_block(completion), asserts).ok)


def code_block(text: str) -> str:
    """Return the content of the first fenced block, or the whole text."""
    block = _BLOCK.search(text)
    return block[1] if block else text


@functools.lru_cache(maxsize=4096)
def entry_of(code: str, tests: str) -> str | None:
    """Name the first function of a program that its tests call; `None` if there is none or it isn't Python 3."""
    tree = _parsed(code)
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)} if tree else set()
    return next((name for name in _CALLED.findall(tests) if name in defined), None)


@functools.lru_cache(maxsize=4096)
def printed_program(code: str, names: tuple[tuple[str, str], ...]) -> str | None:
    """Print a program without comments, docstrings and annotations, its names replaced; `None` if not Python 3."""
    tree = _parsed(code)
    if tree is None:
        return None
    text = ast.unparse(ast.fix_missing_locations(_Bare().visit(tree)))
    for name, neutral in names:
        text = re.sub(rf"\b{name}\b", neutral, text)
    return text


class _Bare(ast.NodeTransformer):
    """Take away what tells programs of different authors apart, and the imports that only annotations need."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        return None if node.module == "typing" else node


def _parsed(code: str) -> ast.Module | None:
    try:
        return ast.parse(code.replace("\r\n", "\n").expandtabs(4))
    except SyntaxError:
        return None


def _alike(one: str, two: str) -> bool:
    # Problems that share half of their words often accept each other's programs.
    words, others = set(one.lower().split()), set(two.lower().split())
    return len(words & others) > 0.6 * len(words | others)
