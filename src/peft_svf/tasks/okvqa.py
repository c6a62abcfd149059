# SPDX-License-Identifier: Apache-2.0
"""
OK-VQA: questions about photographs that need knowledge from elsewhere, each with ten answers of five people.

    prompt (generated form)  [image] What sport can you use this for?
                             Answer with a single word or phrase.
    answers                  "race" 6 times, "motocross" twice, "ride" twice
    completion               "racing"      accuracy 0, reward -1.0; "race" 1, 1.0; "motocross" 2/3, 1/3

There is no choice form. Splits: test is the published one, on COCO's val2014 images; by a hash of the image 1 in 10
training images is validation, the others train.

From a folder it reads `okvqa/OpenEnded_mscoco_train2014_questions.json` with `mscoco_train2014_annotations.json`, the
same for val2014, with images in `okvqa/train2014` and `okvqa/val2014`, or `okvqa/train2014.jsonl.gz` and
`val2014.jsonl.gz` with `question_id`, `image_id`, `question` and `answers` (texts). The Hub has the test split only.

Source: OK-VQA (Marino et al. 2019, arXiv 1906.00067), images of COCO. Licence: CC BY 4.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .task import HubSource, Record
from .vqa import Vqa


class OkVqa(Vqa):
    """Questions that need outside knowledge."""

    name = "okvqa"
    description = "questions about photographs that need outside knowledge"
    files: Mapping[str, str] = {"train": "train2014", "validation": "train2014", "test": "val2014"}
    hub = HubSource("lmms-lab/OK-VQA", None, {"val2014": "val2014"})
    annotations: Mapping[str, tuple[str, ...]] = {
        file: (f"OpenEnded_mscoco_{file}_questions.json", f"mscoco_{file}_annotations.json")
        for file in ("train2014", "val2014")
    }

    def image_path(self, file: str, image_id: Any) -> str:
        """Name the image as COCO does: twelve digits, zeros in front."""
        return f"{file}/COCO_{file}_{int(image_id):012d}.jpg"

    def from_hub(self, record: Record) -> Record:
        """Use the question's id for the image, which the Hub doesn't number."""
        return {"image_id": record["question_id"], **record}

    def _published(self, *contents: dict[str, Any]) -> list[Record]:
        questions, annotations = contents
        answers = {entry["question_id"]: entry["answers"] for entry in annotations["annotations"]}
        return [
            {**question, "answers": [entry["answer"] for entry in answers[question["question_id"]]]}
            for question in questions["questions"]
        ]
