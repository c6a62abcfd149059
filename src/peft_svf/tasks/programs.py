# SPDX-License-Identifier: Apache-2.0
"""
Programming problems: MBPP, and for testing alone MBPP-Pro and HumanEval.

    prompt (choice form)     Write a function to reverse words in a given string.
    choices                  four programs, the right one:                       reward 1.0, the others -1.0
                                 def solve(s):
                                     return ' '.join(reversed(s.split()))

    prompt (generated form)  the problem, the asserts as examples, "Answer with one Python code block."
    completion               "```python\\ndef reverse_words(s): ...\\n```"        reward 1.0 if it passes the asserts

In the choice form the wrong programs solve other problems of the same split and are about as long. All four are
printed by one formatter, with the entry function renamed to `solve` and helpers to `helper`, as a name like
`reverse_words` would give the answer away; long programs stay out. In the generated form the first code block runs in
the sandbox.

Sources: MBPP (Austin et al. 2021, arXiv 2108.07732), MBPP-Pro (Yu et al. 2024, arXiv 2412.21199), HumanEval (Chen et
al. 2021, arXiv 2107.03374). Licences: CC BY 4.0, MIT, MIT.
"""

import ast
import functools
import random
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from .sandbox import run_python
from .task import SPLITS, HubSource, Record, Task, form_of, plain

ENTRY, HELPER = "solve", "helper"
FROM_MBPP_TEST = 231  # Smaller ids of MBPP-Pro belong to MBPP's task_ids 2 to 510, the others to 511 and above.
TWINS = (57, 191)  # These ids are worded like MBPP's task_ids 569 (validation) and 928 (train).
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


class Mbpp(CodeTask):
    """
    MBPP; records have `text`, `code`, `task_id`, `test_list`, `test_setup_code`.

    Splits by task_id as published: 11-510 test, 511-600 validation, 601-974 train.
    """

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


class MbppPro(CodeTask):
    """
    MBPP-Pro, where a second function is to use the first; the choice form has the second alone.

    Records have `raw_problem`, `raw_solution`, `new_problem`, `new_solution`, `test_code`. The first problems are
    MBPP's. 147 of the 378 are of its validation and train splits, so whoever trains on MBPP has seen them: they are
    left out, with two more that MBPP has a second time there. 229 stay.
    """

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
        text, source = " ".join(filter(None, lines)), self.source(raw)
        return _renamed(text, source[1]) if source else text

    def source(self, raw: Record) -> tuple[str, dict[str, str]] | None:
        """Read the second function; the first problem's is the last that it defines."""
        defined = re.findall(r"^def (\w+)", raw["raw_problem"], re.MULTILINE)
        code = raw["new_problem"] + raw["new_solution"]
        entry = entry_of(code, raw["test_code"])
        return (code, {entry: ENTRY, defined[-1]: HELPER}) if defined and entry else None

    def row(self, raw: Record) -> Record:
        problems = f"{raw['raw_problem'].strip()}\n\n{raw['new_problem'].strip()}"
        text = (
            "Write both functions; the second is to call the first. Answer with one Python code block that has both."
            f"\n```python\n{problems}\n```"
        )
        answer = f"{raw['raw_problem']}{raw['raw_solution']}\n\n{raw['new_problem']}{raw['new_solution']}"
        tests = [ast.unparse(statement) for statement in ast.parse(raw["test_code"]).body]
        return self.ask(raw, text, answer=answer, tests=tests)


class HumanEval(CodeTask):
    """
    HumanEval: functions to complete from signature and docstring. A completion may continue or repeat them.

    Records have `task_id`, `prompt`, `entry_point`, `canonical_solution`, `test`.
    """

    name = "humaneval"
    description = "Python functions from a signature and a docstring, test only"
    files: Mapping[str, str] = {"test": "test"}
    hub = HubSource("openai/openai_humaneval", None, {"test": "test"})
    max_characters = 500  # a helper function counts, too

    def identify(self, record: Record, place: str) -> str:
        return str(record["task_id"])

    def question(self, raw: Record) -> str:
        text = ast.get_docstring(_functions(raw["prompt"])[raw["entry_point"]]) or ""
        return _renamed(text, self.source(raw)[1])

    def source(self, raw: Record) -> tuple[str, dict[str, str]]:
        names = {name: ENTRY if name == raw["entry_point"] else HELPER for name in _functions(raw["prompt"])}
        return raw["prompt"] + raw["canonical_solution"], names

    def row(self, raw: Record) -> Record:
        text = f"Complete the function. Answer with one Python code block.\n```python\n{raw['prompt'].strip()}\n```"
        answer, tests = raw["prompt"] + raw["canonical_solution"], [raw["test"], f"check({raw['entry_point']})"]
        return self.ask(raw, text, answer=answer, tests=tests, start=raw["prompt"])

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """Run prompt and code block together: a function in the block takes the place of the one in the prompt."""
        # A docstring is a body, so the prompt is a program whether the block continues it or defines the function.
        return float(run_python(f"{row['start'].rstrip()}\n{code_block(completion)}", row["tests"]).ok)


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
    return _renamed(ast.unparse(ast.fix_missing_locations(_Bare().visit(tree))), dict(names))


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for name, neutral in names.items():
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


@functools.lru_cache(maxsize=512)
def _functions(prompt: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(prompt).body if isinstance(node, ast.FunctionDef)}
