# SPDX-License-Identifier: Apache-2.0
"""
What every benchmark shares: a split becomes rows, a completion becomes right or wrong.

Records come from `<folder>/<name>/<split>.jsonl.gz` or from the Hub. A row has one of the forms of its task:

    choice          picks one of the texts in `choices`; the policy is the softmax of their summed token
                    log-likelihoods as the assistant's answer to `prompt`
    generate        writes free text, which `score` grades
    letter          writes the letter of one of the options that the prompt lists: one token
    calculation     writes the calculation that solves a word problem, such as "8 + 3"; graded by its value

A record of the test split is never used for training or validation. A task knows no model and no tokenizer, and
imports `datasets` only to read the Hub.
"""

import hashlib
import json
import os
import random
import re
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..files import extra, read_bytes
from ..rows import check, has_image

LETTERS = string.ascii_uppercase
LARGEST = 4 << 30  # bytes of a data set, unpacked
DATA_VARIABLE = "PEFT_SVF_DATA"
SPLITS = ("train", "validation", "test")
FORMS = ("choice", "generate")
ANSWER_TOKENS = {"letter": 1, "calculation": 16, "generate": 256}  # limits of an answer, unless set otherwise

Record = dict[str, Any]
Chat = list[dict[str, Any]]
Folder = str | os.PathLike[str] | None


def user_turn(prompt: str | Chat) -> Chat:
    """Return a text as the chat of one user message; a chat stays as it is."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def form_of(row: Mapping[str, Any]) -> str:
    """Return the form of a row; your own rows may have any field `form`."""
    form = row.get("form")
    return "choice" if row.get("choices") is not None else form if form in ("letter", "calculation") else "generate"


def lettered(options: Sequence[str]) -> str:
    """List options as a prompt of the form "letter" ends, one a line with its letter."""
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))
    return f"\n{listed}\nAnswer with one letter."


def rotated(row: Mapping[str, Any], places: int) -> Record:
    """Move the options of a row of the form "letter" up by so many places; the first ones go to the end."""
    if form_of(row) != "letter":
        raise ValueError(f"Row {row.get('id')!r} lists no lettered options that could be rotated: use form 'letter'.")
    options, right = list(row["options"]), LETTERS.index(row["answer"])
    places %= len(options)
    *before, question = row["prompt"]
    moved, text = options[places:] + options[:places], question["content"].removesuffix(lettered(options))
    prompt = [*before, {**question, "content": text + lettered(moved)}]
    return {**row, "prompt": prompt, "options": moved, "answer": LETTERS[(right - places) % len(options)]}


class HubSource(NamedTuple):
    """The arguments of `datasets.load_dataset(path, config, split=splits[file])`."""

    path: str
    config: str | None
    splits: Mapping[str, str]  # name of a local file -> the Hub's split; "a+b" joins two


class Task(ABC):
    """
    A benchmark: where its records are, how a record becomes a row, which completion is right.

    A subclass sets the class attributes and writes `score`, usually `row`, and for the choice form `options`; the rest
    has defaults. A task keeps no state.

    Attributes:
        name (`str`): Name of the task and of its folder.
        kind (`str`): What a dispatcher calls its questions: "reasoning", "math", "code"; "dispatch" for itself.
        description (`str`): One line for people.
        files (mapping `str -> str`): The splits, each with the file that it is cut from if no file has its name.
        forms (`tuple` of `str`): Its forms, the default one first.
        hub ([`HubSource`], *optional*): Where the same records lie on the Hub.
        published_names (`bool`): Whether a file that is named like a split ("test") may be another split.
    """

    name: str
    kind: str
    description: str
    files: Mapping[str, str] = {split: split for split in SPLITS}
    forms: tuple[str, ...] = FORMS
    hub: HubSource | None = None
    published_names = False

    def __repr__(self) -> str:
        return f"<Task {self.name!r}: {self.description}>"

    # What a benchmark defines ------------------------------------------------------------------------------------

    @abstractmethod
    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """Grade a free text that answers a row of the generated form, from 0 (wrong) to 1 (right)."""

    def row(self, raw: Record) -> Record:
        """Make a row of the generated form: `prompt` (a chat), `answer`, `id`, `task` and what `score` needs."""
        return self.ask(raw, raw["prompt"], answer=raw["answer"])

    def question(self, raw: Record) -> str:
        """Return the user's text of the choice form. The default is the bare question."""
        return raw["question"]

    def options(self, raw: Record, pool: Sequence[Record], rng: random.Random) -> tuple[str, list[str]] | None:
        """Return the right choice and the wrong ones, or `None` to leave the record out of the choice form."""
        return None

    def solved(self, raw: Record, row: Mapping[str, Any]) -> str:
        """Write the answer to a row as an example shows it: by default the record's `solution`, or the bare answer."""
        if form_of(row) == "choice":
            return row["choices"][row["label"]]
        return str(raw["solution"] if form_of(row) == "generate" and raw.get("solution") else row["answer"])

    def cut(self, split: str, records: list[Record]) -> list[Record]:
        """Take one split out of a file of several splits. The default takes every record."""
        return records

    def identify(self, record: Record, place: str) -> str:
        """Return a record's id, by default its field `id`, else its place, "arc_easy-test-12"."""
        return str(record.get("id", place))

    def place(self, split: str, row: Mapping[str, Any]) -> str:
        """Name the origin of a row for a message about it."""
        return f"Task '{self.name}', {split} row {row['id']!r}"

    def item(self, raw: Record) -> str:
        """Return what two records of the same item share: by default the prompt, but for case and spaces."""
        return plain("\n".join(str(message["content"]) for message in self.row(raw)["prompt"]))

    def from_hub(self, record: Record) -> Record:
        """Rename the Hub's fields as in the files. The default changes nothing."""
        return record

    def ask(self, raw: Record, prompt: str | Chat, **columns: Any) -> Record:
        """Make a row of a prompt, some columns, and the record's `id` and `task`."""
        return {"prompt": user_turn(prompt), **columns, "id": str(raw["id"]), "task": self.name}

    # What all benchmarks do --------------------------------------------------------------------------------------

    def load(self, split: str, folder: Folder = None) -> list[Record]:
        """
        Load the records of a split, each a `dict` with an `id`.

        Args:
            split (`str`):
                One of `files`: "train", "validation", "test". No record is in two of them, and what is in the test
                split again under another id is left out of the others.
            folder (`str` or path, *optional*):
                Folder with `<name>/<split>.jsonl.gz` or `.jsonl`. Without it the folder that the environment variable
                `PEFT_SVF_DATA` names; without that the Hub, which needs `datasets`.

        Raises:
            `ValueError`: if the task has no such split.
            `FileNotFoundError`: if the folder or the Hub has no file for it.
            `ConnectionError`: if the Hub can't be read.
        """
        if split not in self.files:
            way_out = "" if "train" in self.files else " It only tests: train and choose checkpoints on another task."
            raise ValueError(f"Task '{self.name}' has no split '{split}'; it has {', '.join(self.files)}.{way_out}")
        records = self._records(split, folder)
        if split == "test" or "test" not in self.files:
            return records
        try:
            tested = {self.item(record) for record in self._records("test", folder)}
        except FileNotFoundError:  # a folder of training rows alone
            return records
        return [record for record in records if self.item(record) not in tested]

    def rows(
        self,
        split: str,
        form: str = "choice",
        limit: int | None = None,
        seed: int = 0,
        folder: Folder = None,
        system: str | None = None,
        shots: int = 0,
        solved: bool = False,
    ) -> list[Record]:
        """
        Make the rows of a split, in an order that the seed fixes; all have `prompt`, `id` and `task`.

        Args:
            split (`str`), folder (`str` or path, *optional*): As in [`Task.load`].
            form (`str`): One of `forms`. Rows of "choice" have `choices` and `label`; all others have `answer`.
            limit (`int`, *optional*): Keep the first rows only; a larger limit contains a smaller one.
            seed (`int`): Fixes the order of rows, the distractors and the place of the right choice.
            system (`str`, *optional*): System prompt of rows that have none.
            shots (`int`):
                How many solved examples, turns of user and assistant, precede each question. They are taken out of
                the training split and are the same for all rows, splits and seeds, so that runs can be compared and a
                model reads them once for a whole batch. Rows with images take none.
            solved (`bool`): Add the column `solution`, a text as [`Task.solved`] writes it.
        """
        if form not in self.forms:
            raise ValueError(f"Task '{self.name}' has no form '{form}'; it has {', '.join(self.forms)}.")
        examples, shown = self._examples(form, shots, folder) if shots else ([], set[str]())
        raws = self.load(split, folder)
        made = ((raw, self.make_row(raw, form, raws, seed)) for raw in shuffled(raws, f"{self.name}:{seed}"))
        kept = ((raw, row) for raw, row in made if row is not None and row["id"] not in shown)
        rows = (row | {"solution": self.solved(raw, row)} if solved else row for raw, row in kept)
        return [_framed(row, system, examples) for row in islice(rows, limit)]

    def make_row(self, raw: Record, form: str, pool: Sequence[Record] = (), seed: int = 0) -> Record | None:
        """Make a row of any form; arguments and `None` as in [`Task.choice_row`]."""
        if form not in ("choice", "letter"):
            return self.row(raw)
        row = self.choice_row(raw, pool, seed)
        if form == "choice" or row is None:
            return row
        if len(row["choices"]) > len(LETTERS):
            return None
        *before, question = row.pop("prompt")
        options, label = row.pop("choices"), row.pop("label")
        prompt = [*before, {**question, "content": question["content"] + lettered(options)}]
        return {**row, "prompt": prompt, "answer": LETTERS[label], "options": options, "form": form}

    def _examples(self, form: str, count: int, folder: Folder) -> tuple[Chat, set[str]]:
        """Return solved examples as turns, and their ids."""
        raws = self.load("train", folder)
        made = ((raw, self.make_row(raw, form, raws)) for raw in shuffled(raws, f"{self.name}:shots"))
        turns, ids = Chat(), set[str]()
        for raw, row in islice(((raw, row) for raw, row in made if row is not None), count):
            if has_image(row):  # the question's picture would be put into an example
                raise ValueError(f"Task '{self.name}' has images, which take no solved examples: set shots=0.")
            turns += [*_without_system(row["prompt"]), {"role": "assistant", "content": self.solved(raw, row)}]
            ids.add(row["id"])
        return turns, ids

    def choice_row(self, raw: Record, pool: Sequence[Record] = (), seed: int = 0) -> Record | None:
        """
        Make a row of the choice form: `prompt` (a chat), `choices` (texts), `label` (index of the right one).

        Args:
            raw (`dict`): One record of [`Task.load`].
            pool (sequence of `dict`): The records of the same split, if distractors are other records' answers.
            seed (`int`): Fixes distractors and order together with the record's id, whatever its neighbours.

        Returns:
            `dict`, or `None` for a record that doesn't suit the choice form.
        """
        rng = random.Random(f"{self.name}:{raw['id']}:{seed}")
        options = self.options(raw, pool, rng)
        if options is None:
            return None
        right, wrong = options
        choices = [right, *wrong]
        rng.shuffle(choices)
        return self.ask(raw, self.question(raw), choices=choices, label=choices.index(right))

    def grade(self, completion: str, row: Mapping[str, Any]) -> float:
        """Grade an answer to a row of any form from 0 to 1; [`Task.score`] grades the free text of "generate"."""
        form = form_of(row)
        if form == "choice":
            return float(completion == row["choices"][row["label"]])
        if form == "letter":
            return float(re.match(rf"\W*{row['answer']}(?!\w)", completion) is not None)
        return self.score(completion, row)

    def reward(self, completions: Sequence[str | Chat], **columns: Any) -> list[float]:
        """
        Score completions in the form of TRL's reward functions.

        Args:
            completions (sequence of `str` or of chats): The model's answers.
            columns (sequences as long as `completions`): The fields of the rows; TRL's other arguments are ignored.

        Returns:
            `list` of `float`: 1.0 for a right answer, else -1.0 (section 3.2 of arXiv 2501.06252); in between for a
            task that grades, `2 * score - 1`.
        """
        lists = {name: c for name, c in columns.items() if isinstance(c, (list, tuple)) and len(c) == len(completions)}
        rows = ({name: column[index] for name, column in lists.items()} for index in range(len(completions)))
        return [2.0 * self.grade(text, row) - 1.0 for text, row in zip(map(_text, completions), rows, strict=True)]

    # Where records come from -------------------------------------------------------------------------------------

    def _records(self, split: str, folder: Folder) -> list[Record]:
        """Read a split as it is published; [`Task.load`] keeps the test split's items out of it."""
        folder = folder or os.environ.get(DATA_VARIABLE)
        file, records = self._read_folder(split, Path(folder)) if folder else self._read_hub(split)
        for index, record in enumerate(records):
            record["id"] = self.identify(record, f"{self.name}-{file}-{index}")
        # "validation.jsonl.gz" holds the split and nothing else, even if it's usually cut out of "train"
        return self.cut(split, records) if file == self.files[split] else records

    def _read_folder(self, split: str, folder: Path) -> tuple[str, list[Record]]:
        files = [self.files[split]] if self.published_names else dict.fromkeys((split, self.files[split]))
        paths = {folder / self.name / f"{file}{end}": file for file in files for end in (".jsonl.gz", ".jsonl")}
        for path, file in paths.items():
            if path.is_file():
                return file, read_jsonl(path)
        raise FileNotFoundError(
            f"Task '{self.name}' has no split '{split}' in '{folder}': expected {' or '.join(map(str, paths))}. Pass "
            f"folder=... or set {DATA_VARIABLE} to a folder that has it, or unset it to load the task from the Hub."
        )

    def _read_hub(self, split: str) -> tuple[str, list[Record]]:
        file, name = self.files[split], f"Task '{self.name}'"
        way_out = f"Pass folder=... or set {DATA_VARIABLE} to a folder with '{self.name}/{file}.jsonl.gz'."
        if self.hub is None or file not in self.hub.splits:
            raise FileNotFoundError(f"{name} has no '{file}' on the Hub. {way_out}")
        with extra("eval", f"{name} reads the Hub by `datasets`. {way_out}"):
            import datasets
        try:
            table = datasets.load_dataset(self.hub.path, self.hub.config, split=self.hub.splits[file])
        except Exception as error:  # `datasets` raises many kinds, and the way out is the same for all
            raise ConnectionError(f"{name} couldn't read '{self.hub.path}' from the Hub: {error} {way_out}") from error
        return file, self._hub_records(table)

    def _hub_records(self, table: Any) -> list[Record]:
        return [self.from_hub(dict(record)) for record in table]


def _without_system(chat: Chat) -> Chat:
    return [message for message in chat if message["role"] != "system"]


def _framed(row: Record, system: str | None, examples: Chat) -> Record:
    """Put a system prompt, unless there is one, and solved examples before the question of a row."""
    if not (system or examples):
        return row
    question = _without_system(row["prompt"])
    first = row["prompt"][: len(row["prompt"]) - len(question)]
    if system and not first:
        first = [{"role": "system", "content": system}]
    return {**row, "prompt": [*first, *examples, *question]}


def format_reward(pattern: str) -> Callable[..., list[float]]:
    """
    Make a reward function for the form of an answer: 1 if the completion contains the pattern, else 0.

    Give it a small weight next to the task's reward, such as `reward_weights=[1.0, 0.1]`: a right answer in the wrong
    form then still earns more than a wrong answer in the right form.

    Args:
        pattern (`str`):
            Regular expression, searched with `.` matching line ends, such as `r"[Aa]nswer is -?[\\d,.]+\\s*$"`.

    Returns:
        A function `(completions, **columns) -> list[float]`.
    """
    compiled = re.compile(pattern, re.DOTALL)

    def format_reward(completions: Sequence[str | Chat], **columns: Any) -> list[float]:
        return [float(compiled.search(text) is not None) for text in map(_text, completions)]

    return format_reward


def _text(completion: str | Chat) -> str:
    """Return a completion as a text: TRL passes texts or lists of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)


def shuffled(records: Sequence[Record], seed: str) -> list[Record]:
    """Order records by a hash of their ids: what is in both keeps its order in a file and in a part of that file."""
    return sorted(records, key=lambda record: hashlib.sha256(f"{seed}:{record['id']}".encode()).digest())


def plain(text: str) -> str:
    """Return a text in lower case with single spaces: what differs in these alone is the same item."""
    return " ".join(text.lower().split())


def read_jsonl(path: Path) -> list[Record]:
    """Read the records of a benchmark, one JSON object a line, from a `.jsonl` or a gzipped `.jsonl.gz` file."""
    return [json.loads(line) for _, line in _lines(path)]


def read_rows(path: Path, answered: bool = False) -> list[tuple[str, Record]]:
    """Read rows of JSON lines, each with its place ("'mine.jsonl', line 3"); `answered` as in `rows.check`."""
    rows = []
    for number, line in _lines(path):
        place = f"'{path}', line {number}"
        try:
            row = json.loads(line, parse_constant=int)  # refuses NaN and Infinity, which aren't JSON
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON: {error}.") from None
        check(row, place, answered)
        rows.append((place, row))
    return rows


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = read_bytes(path, LARGEST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' isn't UTF-8 text of one JSON object a line: {error}.") from None
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
