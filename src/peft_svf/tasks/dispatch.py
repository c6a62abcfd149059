# SPDX-License-Identifier: Apache-2.0
"""
Dispatch: name the kind of a question, the first pass of two-pass inference as a task.

    prompt (both forms)      Classify the request as code (a program to write), math (a number to work out), reasoning
                             (a science question) or other (anything else).
                             Request: Write a function to reverse words in a given string.
                             Kind:
    choices                  "code", "math", "reasoning", "other"        the right one: reward 1.0, the others -1.0
    completion               "code"                                      reward 1.0; another kind first, or none: -1.0

Questions come from the same split of the other tasks, as many of each kind: code from MBPP, math from SVAMP and GSM8K,
reasoning from ARC-Easy and ARC-Challenge. "other" is made from templates of everyday requests (`everyday.json`), which
share neither templates nor fillers between splits. A file `dispatch/<split>.jsonl.gz` goes before all this.

Sources and licences are listed in the tasks' files; the everyday requests are this project's, Apache-2.0.
"""

import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .arc import CHALLENGE, EASY
from .programs import Mbpp
from .task import DATA_VARIABLE, Chat, Folder, Record, Task, shuffled, user_turn
from .word_problems import Gsm8k, Svamp

KINDS: dict[str, str] = {
    "code": "a program to write",
    "math": "a number to work out",
    "reasoning": "a science question",
    "other": "anything else",
}
SOURCES: dict[str, tuple[Task, ...]] = {
    "code": (Mbpp(),),
    "math": (Svamp(), Gsm8k()),
    "reasoning": (EASY, CHALLENGE),
}
PER_KIND = {"train": 360, "validation": 88, "test": 300}  # MBPP has 374, 90 and 500


def dispatch_prompt(question: str, descriptions: Mapping[str, str] | None = None) -> Chat:
    """
    Ask which kind a question is; the first pass reads the answer off the likelihoods of the kinds' names.

    Args:
        question (`str`): The user's request. It comes last, after text that is the same for every question.
        descriptions (mapping `str -> str`, *optional*): The kinds, each with a few words or none; default [`KINDS`].
    """
    kinds = KINDS if descriptions is None else descriptions
    named = [f"{name} ({what})" if what else name for name, what in kinds.items()]
    listed = f"{', '.join(named[:-1])} or {named[-1]}" if len(named) > 1 else "".join(named)
    return user_turn(f"Classify the request as {listed}.\nRequest: {question}\nKind:")


def everyday_requests(split: str, count: int) -> list[str]:
    """
    Draw different requests that aren't code, maths or science, the same in every call; at most `count`.

    No split shares a template or a filler of `everyday.json` with another: a held-out request is a new one.
    """
    rng, source = random.Random(f"everyday:{split}"), everyday()[split]
    requests: dict[str, None] = {}
    for attempt in range(20 * count):
        if len(requests) == count:
            break
        template = source["templates"][attempt % len(source["templates"])]
        requests.setdefault(re.sub(r"\{(\w+)\}", lambda slot: rng.choice(source["fillers"][slot[1]]), template))
    return list(requests)


def everyday() -> dict[str, Any]:
    """Read `everyday.json`: for each split `templates` (texts with slots) and `fillers` (texts by slot)."""
    return json.loads(Path(__file__).with_name("everyday.json").read_text(encoding="utf-8"))


class Dispatch(Task):
    """Questions of known kind; records have `id`, `question` and `kind`."""

    name = "dispatch"
    kind = "dispatch"
    description = "naming the kind of a question: code, math, reasoning or other"

    def _records(self, split: str, folder: Folder) -> list[Record]:
        place = folder or os.environ.get(DATA_VARIABLE)
        if place and any((Path(place) / self.name).glob(f"{split}.jsonl*")):
            return super()._records(split, folder)
        records: list[Record] = []
        for kind, sources in SOURCES.items():
            for source in sources:
                for raw in shuffled(source.load(split, folder), self.name)[: PER_KIND[split] // len(sources)]:
                    text = raw["text"] if kind == "code" else raw["question"]
                    records.append({"id": f"dispatch-{source.name}-{raw['id']}", "question": text, "kind": kind})
        for number, text in enumerate(everyday_requests(split, PER_KIND[split])):
            records.append({"id": f"dispatch-other-{split}-{number}", "question": text, "kind": "other"})
        return records

    def choice_row(self, raw: Record, pool: Sequence[Record] = (), seed: int = 0) -> Record:
        # The order is always the same, because each kind is right equally often.
        label = list(KINDS).index(raw["kind"])
        return self.ask(raw, dispatch_prompt(raw["question"]), choices=list(KINDS), label=label)

    def row(self, raw: Record) -> Record:
        return self.ask(raw, dispatch_prompt(raw["question"]), answer=raw["kind"])

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """Compare the first kind that the completion names."""
        named = re.search(rf"\b({'|'.join(KINDS)})\b", completion.lower())
        return float(named is not None and named[1] == row["answer"])
