# SPDX-License-Identifier: Apache-2.0
"""
TextVQA and OK-VQA: questions about photographs, each with ten answers of people.

    prompt (generated form)  [image] what is the brand of this camera?
                             Answer with a single word or phrase.
    answers                  "dakota" 8 times, "nous les gosses", "clos culombu"
    completion               "Dakota"      accuracy 1, reward 1.0; an answer of one person 1/3, -1/3; of nobody 0, -1.0

These tasks have no choice form. The `image` of a row is undecoded, `{"path": ..., "bytes": ...}` as in
`datasets.Image`, so that no picture is opened before it is needed. The grade is VQA accuracy,

    accuracy = min(1, number of people who gave the answer / 3)

after the normalisation of the VQA evaluation (Antol et al. 2015, arXiv 1505.00468; Goyal et al. 2017): lower case, no
punctuation, no articles, number words as digits, contractions with or without apostrophe. The official script takes
the mean of that formula over the ten sets of nine people: 0.3, 0.6 and 0.9 where this one gives 1/3, 2/3 and 1.

    from datasets import Dataset, Image
    Dataset.from_list(task.rows("train", "generate", limit=1000)).cast_column("image", Image())   # decodes on access

Splits: test of TextVQA is its published validation set, as its test answers aren't public; by a hash of the image 1 in
10 training images is validation, the others train. OK-VQA only tests, on its published test set. A folder has
`<task>/<file>.jsonl.gz` with the fields that [`Vqa`] lists; `image` is a path below `<task>`.

Source: TextVQA (Singh et al. 2019, arXiv 1904.08920), images of OpenImages; OK-VQA (Marino et al. 2019, arXiv
1906.00067), images of COCO. Licence: CC BY 4.0, both.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import compress
from pathlib import Path
from typing import Any

from .task import HubSource, Record, Task

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
    published_names = True  # the published validation set is the test split

    def row(self, raw: Record) -> Record:
        """Ask for a short answer, with the image before the text."""
        text = f"{raw['question']}\nAnswer with a single word or phrase."
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        image, answers = raw["image"], list(raw["answers"])
        answer = Counter(map(normalised, answers)).most_common(1)[0][0]
        return self.ask(raw, prompt, image=image() if callable(image) else image, answers=answers, answer=answer)

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """Grade with VQA accuracy."""
        return vqa_accuracy(completion, row["answers"])

    def item(self, raw: Record) -> str:
        return f"{raw['image_id']}\n{raw['question'].lower()}"

    def identify(self, record: Record, place: str) -> str:
        return f"{self.name}-{record['question_id']}"

    def cut(self, split: str, records: list[Record]) -> list[Record]:
        """Cut the published training set: 1 in 10 images, by a hash, is validation with all its questions."""
        if split == "test":
            return records
        hashes = [int(hashlib.sha256(str(record["image_id"]).encode()).hexdigest(), 16) for record in records]
        return list(compress(records, ((value % 10 == 0) == (split == "validation") for value in hashes)))

    def _read_folder(self, split: str, folder: Path) -> tuple[str, list[Record]]:
        file, records = super()._read_folder(split, folder)
        for record in records:
            record["image"] = {"path": os.fspath(folder / self.name / record["image"]), "bytes": None}
        return file, records

    def _hub_records(self, table: Any) -> list[Record]:
        """Leave the images in the table: one is read, still compressed, when its row is made."""
        import datasets

        images = table.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
        records = [self.from_hub(dict(record)) for record in table.remove_columns("image")]
        for index, record in enumerate(records):
            record["image"] = lambda index=index: images[index]["image"]
        return records


class TextVqa(Vqa):
    """Questions about text in photographs."""

    name = "textvqa"
    description = "questions about text in photographs"
    files: Mapping[str, str] = {"train": "train", "validation": "train", "test": "val"}
    hub = HubSource("lmms-lab/textvqa", None, {"train": "train", "val": "validation"})


class OkVqa(Vqa):
    """Questions that need outside knowledge, test only."""

    name = "okvqa"
    description = "questions about photographs that need outside knowledge, test only"
    files: Mapping[str, str] = {"test": "val2014"}
    hub = HubSource("lmms-lab/OK-VQA", None, {"val2014": "val2014"})

    def from_hub(self, record: Record) -> Record:
        """Use the question's id for the image, which the Hub doesn't number."""
        return {"image_id": record["question_id"], **record}


def vqa_accuracy(answer: str, people: Iterable[str]) -> float:
    """Grade an answer by how many people gave it: `min(1, matches / 3)`, all [`normalised`]."""
    answer = normalised(answer)
    return min(1.0, sum(answer == normalised(other) for other in people) / 3)


def normalised(answer: str) -> str:
    """Write an answer as the VQA evaluation compares it: "The  Two dogs." -> "2 dogs", "stop-sign" -> "stop sign"."""
    text = " ".join(answer.lower().split())
    glued = re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        # Next to a space, or if a number is written with commas, a mark is dropped; inside a word it becomes a space.
        beside = f"{mark} " in text or f" {mark}" in text
        text = text.replace(mark, "" if glued or beside else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    text = _CONTRACTION.sub(lambda found: "".join(filter(None, found.groups())), text)
    return " ".join(_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES)
