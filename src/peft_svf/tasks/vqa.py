# SPDX-License-Identifier: Apache-2.0
"""
What questions about images share: a prompt with an image part, answers of ten people, VQA accuracy.

Goes in: a question, an image, the people's answers. Comes out: a row whose `image` is the undecoded form of
`datasets.Image`, `{"path": ..., "bytes": ...}`, so that no picture is opened before it is needed, and a grade:

    accuracy = min(1, number of people who gave the answer / 3)

after the normalisation of the VQA evaluation (Antol et al. 2015, arXiv 1505.00468; Goyal et al. 2017): lower case, no
punctuation, no articles, number words as digits, contractions with or without apostrophe. The official script takes
the mean of that formula over the ten sets of nine people: 0.3, 0.6 and 0.9 where this one gives 1/3, 2/3 and 1.

    from datasets import Dataset, Image
    Dataset.from_list(task.rows("train", "generate", limit=1000)).cast_column("image", Image())   # decodes on access
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .task import Record, Task

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(digit) for digit, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The official table puts apostrophes into contractions that lack one; here they are taken out of those that have one,
# which makes the same pairs equal without a table. A possessive ("women's") keeps its apostrophe, as there.
_CONTRACTION = re.compile(
    r"(n)'(t)\b|'(re|ve|ll|d|m)\b|\b((?:s?he|it|that|there|here|what|where|when|who|how|why|let))'(s)\b"
)


class Vqa(Task):
    """Questions about images; records have `question`, `answers` (texts), `image_id`, `question_id` and `image`."""

    kind = "vision"
    forms = ("generate",)
    annotations: Mapping[str, tuple[str, ...]]  # file -> names of the published JSON files that hold it

    def image_path(self, file: str, image_id: Any) -> str:
        """Name an image as the published archives do, relative to the task's folder."""
        raise NotImplementedError

    def row(self, raw: Record) -> Record:
        """Ask for a short answer; the image part stands before the text."""
        text = f"{raw['question']}\nAnswer with a single word or phrase."
        image = raw["image"]
        return {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            "image": image() if callable(image) else image,
            "answers": list(raw["answers"]),
            "answer": Counter(map(normalised, raw["answers"])).most_common(1)[0][0],
            "id": str(raw["id"]),
            "task": self.name,
        }

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """Grade with VQA accuracy."""
        return vqa_accuracy(completion, row["answers"])

    def check(self, completion: str, row: Mapping[str, Any]) -> bool:
        """Tell whether three people or more gave the answer; `score` has the grades in between."""
        return self.score(completion, row) == 1.0

    def item(self, raw: Record) -> str:
        """Give image and question."""
        return f"{raw['image_id']}\n{raw['question'].lower()}"

    def identify(self, record: Record, place: str) -> str:
        """Give the published question_id."""
        return f"{self.name}-{record['question_id']}"

    def cut(self, split: str, records: list[Record]) -> list[Record]:
        """Cut the published training set: 1 in 10 images, by a hash, is validation with all its questions."""
        if split == "test":
            return records
        wanted = split == "validation"
        return [record for record in records if (_hash(record["image_id"]) % 10 == 0) == wanted]

    def _candidates(self, split: str) -> list[str]:
        return [self.files[split]]  # the published validation set is the test split, whatever its name

    def _read_folder(self, split: str, folder: Path) -> tuple[str, list[Record]]:
        """Read the published JSON files, or rows of our own with the same fields and an `image` path."""
        file = self.files[split]
        paths = [folder / self.name / name for name in self.annotations[file]]
        if not all(path.is_file() for path in paths):
            try:
                _, records = super()._read_folder(split, folder)
            except FileNotFoundError as error:
                names = " and ".join(map(str, paths))
                raise FileNotFoundError(f"{error} The published files would be {names}.") from None
        else:
            records = self._published(*(json.loads(path.read_text("utf-8")) for path in paths))
        for record in records:
            name = record.get("image") or self.image_path(file, record["image_id"])
            record["image"] = {"path": os.fspath(folder / self.name / name), "bytes": None}
        return file, records

    def _published(self, *contents: dict[str, Any]) -> list[Record]:
        """Join the contents of the published JSON files into records."""
        raise NotImplementedError

    def _hub_records(self, table: Any) -> list[Record]:
        """Leave the images in the table: one is read, still compressed, when its row is made."""
        import datasets

        images = table.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
        records = [self.from_hub(dict(record)) for record in table.remove_columns("image")]
        for index, record in enumerate(records):
            record["image"] = functools.partial(_stored, images, index)
        return records


def vqa_accuracy(answer: str, people: Iterable[str]) -> float:
    """
    Grade an answer by how many people gave it: `min(1, matches / 3)`, after [`normalised`].

    Args:
        answer (`str`): What a model wrote.
        people (iterable of `str`): What people answered, usually ten.

    Returns:
        `float` from 0 to 1.
    """
    given = normalised(answer)
    return min(1.0, sum(given == normalised(other) for other in people) / 3)


def normalised(answer: str) -> str:
    """
    Bring an answer into the form in which the VQA evaluation compares.

    "The  Two dogs." -> "2 dogs", "don't" -> "dont", "1,000" -> "1000", "stop-sign" -> "stop sign".
    """
    text = " ".join(answer.lower().split())
    glued = re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        # beside a space, and wherever a number is written with commas, a mark is dropped; inside a word it parts
        beside = f"{mark} " in text or f" {mark}" in text
        text = text.replace(mark, "" if glued or beside else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    text = _CONTRACTION.sub(lambda found: "".join(filter(None, found.groups())), text)
    return " ".join(_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES)


def _stored(images: Any, index: int) -> dict[str, Any]:
    return images[index]["image"]


def _hash(image_id: Any) -> int:
    return int(hashlib.sha256(str(image_id).encode()).hexdigest(), 16)
