# SPDX-License-Identifier: Apache-2.0
"""
Your own JSONL -> a task like the package's.

    {"prompt": "Capital of France?", "answer": "Paris"}                               generated form
    {"prompt": "Capital of France?", "choices": ["Paris", "Rome"], "label": 0}        all, and the letter form

    completion               "paris."      reward 1.0; "I think Paris", "Rome" -1.0
    completion               "20 + 22 = 42" if the answer is "42" or 42              reward 1.0; without a number -1.0

A file is read whole and checked line by line before anything is trained on it. One file is cut into three splits by
hashes of its prompts; a folder has a file for each split, and no prompt of its test file may be in another one.
"""

import hashlib
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..rows import Row
from .task import FORMS, SPLITS, Folder, Record, Task, plain, read_rows, user_turn
from .word_problems import final_number

TAKEN = {"completions", "prompts", "self"}  # arguments of a reward function, so no fields
_NUMBER = re.compile(r"\s*[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)\s*")
TEST, HELD_OUT = 20, 30  # percent of a single file: test, and test with validation


class Line(NamedTuple):
    """A line of a file."""

    place: str  # file and number
    record: Record

    @property
    def item(self) -> str:
        """The prompt, but for case and spaces."""
        return plain("\n".join(str(message["content"]) for message in user_turn(self.record["prompt"])))


def jsonl_task(
    source: str | os.PathLike[str],
    name: str | None = None,
    kind: str = "other",
    description: str | None = None,
    score: Callable[[str, Row], float] | None = None,
) -> Task:
    """
    Turn your own JSONL into a task: `task.rows("train")`, `task.reward`.

    Args:
        source (`str` or path):
            A `.jsonl` or `.jsonl.gz` file, or a folder with at least one of `train`, `validation` and `test`. A line
            has `prompt` (a text or a chat) and either `answer` (a text or a number) or `choices` (two or more
            different texts) with `label` (the index of the right one); `id` is optional and unique in its file, and
            all other fields stay in the rows. Lines with `answer` make a source of the generated form alone.
        name (`str`, *optional*):
            Name of the task, default the file's or the folder's.
        kind, description (`str`):
            What a dispatcher calls its questions, and a line for people.
        score (callable `(completion, row) -> float`, *optional*):
            Grades a free text from 0 to 1. The default compares numbers if the answer is one, with the last number
            of the completion, else texts, apart from case, spaces and a full stop.

    Raises:
        `FileNotFoundError`: if the file doesn't exist, or the folder has none.
        `ValueError`: if a line breaks these rules, with file, line and what was expected.
    """
    path = Path(source)
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return _JsonlTask(path, name or stem, kind, description or f"rows of {path.name}", score or same_answer)


class _JsonlTask(Task):
    """The rows of a file or a folder."""

    def __init__(self, path: Path, name: str, kind: str, description: str, score: Callable[[str, Row], float]) -> None:
        self.name, self.kind, self.description, self._score = name, kind, description, score
        self._lines: dict[str, dict[str, Line]] = {}  # split -> id -> line
        for split, lines in _read_splits(path).items():
            for index, line in enumerate(lines):
                id = line.record.get("id")
                line.record["id"] = f"{name}-{split}-{index}" if id is None else str(id)
            self._lines[split] = {line.record["id"]: line for line in lines}
        self.files = {split: split for split in self._lines}
        choices = all("choices" in line.record for lines in self._lines.values() for line in lines.values())
        self.forms = (*FORMS, "letter") if choices else ("generate",)

    def _records(self, split: str, folder: Folder) -> list[Record]:
        return [dict(line.record) for line in self._lines[split].values()]

    def place(self, split: str, row: Row) -> str:
        return self._lines[split][row["id"]].place

    def row(self, raw: Record) -> Record:
        extra = {field: value for field, value in raw.items() if field not in ("choices", "label")}
        answer = raw["choices"][raw["label"]] if "choices" in raw else raw["answer"]
        return extra | self.ask(raw, raw["prompt"], answer=str(answer))

    def choice_row(self, raw: Record, pool: Sequence[Record] = (), seed: int = 0) -> Record | None:
        order = list(range(len(raw["choices"])))
        random.Random(f"{self.name}:{raw['id']}:{seed}").shuffle(order)
        choices = [raw["choices"][index] for index in order]
        return raw | self.ask(raw, raw["prompt"], choices=choices, label=order.index(raw["label"]))

    def score(self, completion: str, row: Row) -> float:
        return float(self._score(completion, row))


def same_answer(completion: str, row: Row) -> float:
    """Compare with `row["answer"]`: by the last number if that is a number, else as texts."""
    answer = str(row["answer"])
    if _NUMBER.fullmatch(answer):
        return float(final_number(completion) == final_number(answer))
    return float(plain(completion).rstrip(".") == plain(answer).rstrip("."))


def _read_splits(path: Path) -> dict[str, list[Line]]:
    if path.is_file():
        return _cut(path, _read(path))
    candidates = {split: [path / f"{split}{end}" for end in (".jsonl.gz", ".jsonl")] for split in SPLITS}
    files = {split: next(filter(Path.is_file, paths), None) for split, paths in candidates.items()}
    splits = {split: lines for split, file in files.items() if file is not None and (lines := _read(file))}
    if not splits:
        raise FileNotFoundError(f"'{path}' is neither a .jsonl file nor a folder with lines in a train.jsonl.")
    tested = {line.item for line in splits.get("test", ())}
    for split in (name for name in splits if name != "test"):
        if shared := [line for line in splits[split] if line.item in tested]:
            raise ValueError(
                f"'{path}': {len(shared)} prompts of {split} are also in test, such as "
                f"{shared[0].record['prompt']!r:.80}. Take them out of one of the files."
            )
    return splits


def _read(path: Path) -> list[Line]:
    lines, places = [Line(*row) for row in read_rows(path, answered=True)], dict[str, str]()
    for place, record in lines:
        if taken := sorted(TAKEN & record.keys()):
            raise ValueError(f"{place}: a field cannot be called {taken[0]!r}: rewards have an argument of this name.")
        id = record.get("id")
        if id is not None and (first := places.setdefault(str(id), place)) != place:
            raise ValueError(f"{place}: its id {str(id)!r} is also that of {first}: make them differ.")
    return lines


def _cut(path: Path, lines: list[Line]) -> dict[str, list[Line]]:
    """Deal the lines of one file by hashes of their prompts, so that equal prompts stay together."""
    splits: dict[str, list[Line]] = {split: [] for split in SPLITS}
    for line in lines:
        share = int(hashlib.sha256(line.item.encode()).hexdigest(), 16) % 100
        splits["test" if share < TEST else "validation" if share < HELD_OUT else "train"].append(line)
    if empty := [split for split, part in splits.items() if not part]:
        raise ValueError(
            f"'{path}' has {len({line.item for line in lines})} different prompts, too few to cut: nothing falls to "
            f"{' and '.join(empty)}. Add lines, or make a folder of train.jsonl, validation.jsonl and test.jsonl."
        )
    return splits
