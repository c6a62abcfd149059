# SPDX-License-Identifier: Apache-2.0
"""
TextVQA: questions about photographs that show text, each answered by ten people.

    prompt (generated form)  [image] what is the brand of this camera?
                             Answer with a single word or phrase.
    answers                  "dakota" 8 times, "nous les gosses", "clos culombu"
    completion               "Dakota"      accuracy 1, reward 1.0; an answer of one person 1/3, -1/3; of nobody 0, -1.0

There is no choice form. Splits: test is the published validation set, as the answers of the published test set are not
public; by a hash of the image 1 in 10 training images is validation, the others train.

From a folder it reads `textvqa/TextVQA_0.5.1_train.json` and `..._val.json` with images in `textvqa/train_images`, or
`textvqa/train.jsonl.gz` and `val.jsonl.gz` with the same fields.

Source: TextVQA (Singh et al. 2019, arXiv 1904.08920), images of OpenImages. Licence: CC BY 4.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .task import HubSource, Record
from .vqa import Vqa


class TextVqa(Vqa):
    """Questions about text in photographs."""

    name = "textvqa"
    description = "questions about text in photographs"
    files: Mapping[str, str] = {"train": "train", "validation": "train", "test": "val"}
    hub = HubSource("lmms-lab/textvqa", None, {"train": "train", "val": "validation"})
    annotations: Mapping[str, tuple[str, ...]] = {file: (f"TextVQA_0.5.1_{file}.json",) for file in ("train", "val")}

    def image_path(self, file: str, image_id: Any) -> str:
        """Name the image: one archive holds those of both files."""
        return f"train_images/{image_id}.jpg"

    def _published(self, *contents: dict[str, Any]) -> list[Record]:
        return [dict(record) for record in contents[0]["data"]]
