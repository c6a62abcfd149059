# SPDX-License-Identifier: Apache-2.0
"""
HumanEval: 164 functions to complete from signature and docstring; an unseen task, so it only tests.

    prompt (choice form)     Return length of given string
                             >>> solve('')
                             0
    choices                  four programs, the right one:                       reward 1.0, the others -1.0
                                 def solve(string):
                                     return len(string)

    prompt (generated form)  "Complete the function. Answer with one Python code block.", the signature and docstring
    answer                   the published program
    completion               "```python\\ndef strlen(string): ...\\n```"         reward 1.0 if it passes the tests

In the choice form the wrong programs solve other problems of the set; see `program` for how they are drawn and
printed. In the generated form a completion may define the function or go on where the docstring ends; the prompt's
imports and helper functions are there in both cases.

There is one split, test. Source: HumanEval (Chen et al. 2021, arXiv 2107.03374). Licence: MIT.
"""

import ast
import functools
import re
from collections.abc import Mapping
from typing import Any

from .program import ENTRY, HELPER, CodeTask, code_block
from .sandbox import run_python
from .task import HubSource, Record


class HumanEval(CodeTask):
    """Functions to complete; records have `task_id`, `prompt`, `entry_point`, `canonical_solution`, `test`."""

    name = "humaneval"
    description = "Python functions from a signature and a docstring, test only"
    files: Mapping[str, str] = {"test": "test"}
    hub = HubSource("openai/openai_humaneval", None, {"test": "test"})
    max_characters = 500  # a helper function counts, too

    def identify(self, record: Record, place: str) -> str:
        return str(record["task_id"])

    def question(self, raw: Record) -> str:
        text = ast.get_docstring(_functions(raw["prompt"])[raw["entry_point"]]) or ""
        for name, neutral in _neutral(raw).items():
            text = re.sub(rf"\b{name}\b", neutral, text)
        return text

    def source(self, raw: Record) -> tuple[str, dict[str, str]] | None:
        return raw["prompt"] + raw["canonical_solution"], _neutral(raw)

    def row(self, raw: Record) -> Record:
        text = f"Complete the function. Answer with one Python code block.\n```python\n{raw['prompt'].strip()}\n```"
        answer, tests = raw["prompt"] + raw["canonical_solution"], [raw["test"], f"check({raw['entry_point']})"]
        return self.ask(raw, text, answer=answer, tests=tests, start=raw["prompt"])

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """Run prompt and code block together: a function in the block takes the place of the one in the prompt."""
        # A docstring is a body, so the prompt is a program whether the block continues it or defines the function.
        return float(run_python(f"{row['start'].rstrip()}\n{code_block(completion)}", row["tests"]).ok)


@functools.lru_cache(maxsize=512)
def _functions(prompt: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(prompt).body if isinstance(node, ast.FunctionDef)}


def _neutral(raw: Record) -> dict[str, str]:
    return {name: ENTRY if name == raw["entry_point"] else HELPER for name in _functions(raw["prompt"])}
