# SPDX-License-Identifier: Apache-2.0
"""
MBPP: mostly basic Python problems, each with a program and three asserts.

    prompt (choice form)     Write a function to reverse words in a given string.
    choices                  four programs, the right one:                       reward 1.0, the others -1.0
                                 def solve(s):
                                     return ' '.join(reversed(s.split()))

    prompt (generated form)  the problem, the asserts as examples, "Answer with one Python code block."
    answer                   the published program
    completion               "```python\\ndef reverse_words(s): ...\\n```"        reward 1.0 if it passes the asserts

In the choice form the wrong programs solve other problems of the same split. All four are printed by one formatter,
with the entry function renamed to `solve`, as a name like `reverse_words` would give the answer away; programs over
300 characters stay out. In the generated form the first code block runs against the asserts in the sandbox.

Splits by task_id as published: 11-510 test, 511-600 validation, 601-974 train.
Source: MBPP (Austin et al. 2021, arXiv 2108.07732). Licence: CC BY 4.0.
"""

from __future__ import annotations

import ast
import functools
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .sandbox import run_python
from .task import SPLITS, HubSource, Record, Task, user_turn

MAX_CHARACTERS = 300
ENTRY = "solve"
_BLOCK = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_CALLED = re.compile(r"\b([A-Za-z_]\w*)\s*\(")


class Mbpp(Task):
    """Basic Python problems; records have `text`, `code`, `task_id`, `test_list`, `test_setup_code`."""

    name = "mbpp"
    kind = "code"
    description = "basic Python programming problems"
    hub = HubSource("google-research-datasets/mbpp", "full", {split: split for split in SPLITS})

    def load(self, split: str, folder: Any = None) -> list[Record]:
        """Load a split; the id is the published task_id."""
        return [{**record, "id": f"mbpp-{record['task_id']}"} for record in super().load(split, folder)]

    def question(self, raw: Record, choices: Sequence[str]) -> str:
        """Give the bare problem."""
        return raw["text"]

    def options(self, raw: Record, pool: Sequence[Record], rng: random.Random) -> tuple[str, list[str]] | None:
        """Give the record's program and three of other problems that are about as long, in characters and in lines."""
        right = program(raw)
        if right is None:
            return None
        programs = {program(other) for other in pool if not _alike(raw["text"], other["text"])}
        others = {code for code in programs if code is not None and code != right}

        def distance(code: str) -> tuple[int, str]:
            # a line counts as ten characters: the programs of one row should look alike on the page as well; the code
            # itself settles ties, so that the order of the file plays no part
            return abs(len(code) - len(right)) + 10 * abs(code.count("\n") - right.count("\n")), code

        below = sorted((code for code in others if len(code) <= len(right)), key=distance)[:8]
        above = sorted((code for code in others if len(code) > len(right)), key=distance)[:8]
        if len(below) + len(above) < 3:
            return None
        # the rank among the four lengths is drawn first, as no rank may be the better guess
        shorter = max(min(rng.randrange(4), len(below)), 3 - len(above))
        return right, rng.sample(below, shorter) + rng.sample(above, 3 - shorter)

    def row(self, raw: Record) -> Record:
        """Ask for a code block, with the asserts as examples: they fix the function's name and its arguments."""
        asserts = "\n".join(raw["test_list"])
        return {
            "prompt": user_turn(f"{raw['text']}\nIt must pass:\n{asserts}\nAnswer with one Python code block."),
            "answer": raw["code"].replace("\r\n", "\n"),
            "tests": list(raw["test_list"]),
            "setup": raw.get("test_setup_code") or "",
            "id": str(raw["id"]),
            "task": self.name,
        }

    def check(self, completion: str, row: Mapping[str, Any]) -> bool:
        """Run the first code block, or the whole text where there is none, against the asserts in the sandbox."""
        asserts = [*filter(None, [row.get("setup")]), *row["tests"]]
        return run_python(code_block(completion), asserts).ok


def code_block(text: str) -> str:
    """Give the content of the first fenced block, or the whole text."""
    found = _BLOCK.search(text)
    return found.group(1) if found else text


def program(raw: Record) -> str | None:
    """Print a record's program in one style under a neutral name; `None` if it's too long or isn't Python 3."""
    return _program(raw["code"], " ".join(raw["test_list"]))


@functools.lru_cache(maxsize=4096)
def _program(code: str, tests: str) -> str | None:
    try:
        tree = ast.parse(code.replace("\r\n", "\n").expandtabs(4))
    except SyntaxError:
        return None
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    entry = next((name for name in _CALLED.findall(tests) if name in defined), None)
    if entry is None:
        return None
    text = re.sub(rf"\b{entry}\b", ENTRY, ast.unparse(tree))
    return text if len(text) <= MAX_CHARACTERS else None


def _alike(one: str, two: str) -> bool:
    # problems that share half of their words often accept each other's programs
    words, others = set(one.lower().split()), set(two.lower().split())
    return len(words & others) > 0.6 * len(words | others)
