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

from .program import ENTRY, CodeTask, entry_of
from .task import SPLITS, HubSource, Record, plain


class Mbpp(CodeTask):
    """Basic Python problems; records have `text`, `code`, `task_id`, `test_list`, `test_setup_code`."""

    name = "mbpp"
    description = "basic Python programming problems"
    hub = HubSource("google-research-datasets/mbpp", "full", {split: split for split in SPLITS})

    def identify(self, record: Record, place: str) -> str:
        return f"mbpp-{record['task_id']}"

    def item(self, raw: Record) -> str:
        """Return the problem without its asserts: three of the train set are in the test set with other asserts."""
        return plain(raw["text"])

    def question(self, raw: Record) -> str:
        return raw["text"]

    def source(self, raw: Record) -> tuple[str, dict[str, str]] | None:
        entry = entry_of(raw["code"], " ".join(raw["test_list"]))
        return None if entry is None else (raw["code"], {entry: ENTRY})

    def row(self, raw: Record) -> Record:
        """Ask for a code block, with the asserts as examples: they fix the function's name and its arguments."""
        tests, setup = list(raw["test_list"]), raw.get("test_setup_code") or ""
        text = "\n".join([raw["text"], "It must pass:", *tests, "Answer with one Python code block."])
        return self.ask(raw, text, answer=raw["code"].replace("\r\n", "\n"), tests=tests, setup=setup)
