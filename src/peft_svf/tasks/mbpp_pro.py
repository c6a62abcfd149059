# SPDX-License-Identifier: Apache-2.0
"""
MBPP-Pro: two functions a problem, where the second is to use the first; an unseen task, so it only tests.

    prompt (choice form)     Given a list of strings, write a Python function to find the minimum number of ...
    choices                  four programs, the right one:                       reward 1.0, the others -1.0
                                 def solve(lst, ch):
                                     return [helper(s, ch) for s in lst]

    prompt (generated form)  both problems with their signatures, "Answer with one Python code block that has both."
    answer                   both published functions
    completion               "```python\\ndef remove_Occ ... def remove_all_occurrences ...\\n```"
                                                                         reward 1.0 if it passes the tests

In the choice form the programs are the second functions alone, the first is called `helper`; see `program` for how the
wrong ones are drawn and printed.

The first problems are MBPP's. 147 of the 378 are of its validation and train splits, so whoever trains on MBPP has
seen them: they are left out, with two more that MBPP has a second time there. 229 stay. The file's order is MBPP's, so
one number parts most of them.

There is one split, test. Source: MBPP-Pro (Yu et al. 2024, arXiv 2412.21199). Licence: MIT; MBPP's is CC BY 4.0.
"""

import ast
import re
from collections.abc import Mapping

from .program import ENTRY, HELPER, CodeTask, entry_of
from .task import HubSource, Record

FROM_MBPP_TEST = 231  # ids below are of MBPP's task_ids 2 to 510, those from here on of 511 and above
TWINS = (57, 191)  # these two are worded like MBPP's task_ids 569, of validation, and 928, of train


class MbppPro(CodeTask):
    """Pairs of problems; records have `raw_problem`, `raw_solution`, `new_problem`, `new_solution`, `test_code`."""

    name = "mbpp_pro"
    description = "Python problems that build on a simpler one, test only"
    files: Mapping[str, str] = {"test": "test"}
    hub = HubSource("CodeEval-Pro/mbpp-pro", None, {"test": "train"})

    def cut(self, split: str, records: list[Record]) -> list[Record]:
        """Leave out the problems that are built on MBPP's validation and train splits."""
        numbered = [(int(record["id"].rsplit("-", 1)[1]), record) for record in records]
        return [record for number, record in numbered if number < FROM_MBPP_TEST and number not in TWINS]

    def identify(self, record: Record, place: str) -> str:
        return f"{self.name}-{record['id']}"

    def question(self, raw: Record) -> str:
        """Return the second problem's text, the comments above its signature."""
        lines = [line.lstrip("# ") for line in raw["new_problem"].splitlines() if line.startswith("#")]
        text = " ".join(filter(None, lines))
        first, second = _names(raw)
        return re.sub(rf"\b{second}\b", ENTRY, re.sub(rf"\b{first}\b", HELPER, text)) if first and second else text

    def source(self, raw: Record) -> tuple[str, dict[str, str]] | None:
        first, second = _names(raw)
        if first is None or second is None:
            return None
        return raw["new_problem"] + raw["new_solution"], {second: ENTRY, first: HELPER}

    def row(self, raw: Record) -> Record:
        problems = f"{raw['raw_problem'].strip()}\n\n{raw['new_problem'].strip()}"
        text = (
            "Write both functions; the second is to call the first. Answer with one Python code block that has both."
            f"\n```python\n{problems}\n```"
        )
        answer = f"{raw['raw_problem']}{raw['raw_solution']}\n\n{raw['new_problem']}{raw['new_solution']}"
        tests = [ast.unparse(statement) for statement in ast.parse(raw["test_code"]).body]
        return self.ask(raw, text, answer=answer, tests=tests)


def _names(raw: Record) -> tuple[str | None, str | None]:
    """Name the first problem's function, the last that it defines, and the second's, which the tests call."""
    defined = re.findall(r"^def (\w+)", raw["raw_problem"], re.MULTILINE)
    return defined[-1] if defined else None, entry_of(raw["new_problem"] + raw["new_solution"], raw["test_code"])
