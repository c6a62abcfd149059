# SPDX-License-Identifier: Apache-2.0
"""
ARC: grade-school science with three to five options, in an easy and a challenge set.

    prompt (choice form)     Which layer of Earth is made of solid metal?
    choices                  "mantle", "inner core", "crust", "outer core"       the right one: reward 1.0, others -1.0

    prompt (generated form)  the question, the options as (A) ... (D), "End with: The answer is (X)."
    prompt (letter form)     the question, the options as A. ... D. in an order of the seed, "Answer with one letter."
    answer                   "B"
    completion               "Iron and nickel ... The answer is (B)."            reward 1.0; without an answer -1.0
                             in the letter form "B"

Source: AI2 Reasoning Challenge (Clark et al. 2018, arXiv 1803.05457), splits as published. Licence: CC BY-SA 4.0.
"""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .task import FORMS, LETTERS, SPLITS, HubSource, Record, Task, form_of, plain

_STATED = re.compile(  # "(a)" is a letter, "a plant" is not
    r"(?i:answer|option|choice)(?:\s+(?i:is))?[\s:*]*(?:\(([A-Ea-e])\)|([A-E])\b)"
)
_ALONE = re.compile(r"^[\s(*]*([A-E])\s*(?:[).:*]|$)")  # "A) honey", not "A bee"


class Arc(Task):
    """One of the two sets of ARC; records have `question`, `choices` (texts) and `answer` (index)."""

    kind = "reasoning"
    forms = (*FORMS, "letter")

    def __init__(self, name: str, which: str, config: str) -> None:
        self.name, self.description = name, f"grade-school science questions, the {which} set"
        self.hub = HubSource("allenai/ai2_arc", config, {split: split for split in SPLITS})

    def options(self, raw: Record, pool: Sequence[Record], rng: random.Random) -> tuple[str, list[str]] | None:
        """Return the record's own options; a record that prints one option twice has no single right text."""
        texts = raw["choices"]
        if len(set(texts)) < len(texts):
            return None
        right = texts[raw["answer"]]
        return right, [text for text in texts if text != right]

    def row(self, raw: Record) -> Record:
        listed = "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, raw["choices"], strict=False))
        text = f"{raw['question']}\n{listed}\nEnd with: The answer is (X)."
        return self.ask(raw, text, answer=LETTERS[raw["answer"]], options=list(raw["choices"]))

    def solved(self, raw: Record, row: Mapping[str, Any]) -> str:
        return f"The answer is ({row['answer']})." if form_of(row) == "generate" else super().solved(raw, row)

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """Compare the last stated letter; without one a leading letter, or the option's text standing alone."""
        if stated := _STATED.findall(completion):
            return float("".join(stated[-1]).upper() == row["answer"])
        if alone := _ALONE.match(completion):
            return float(alone[1] == row["answer"])
        options = [_bare(text) for text in row.get("options") or []]
        text = _bare(completion)
        return float(text in options and options.index(text) == LETTERS.index(row["answer"]))

    def item(self, raw: Record) -> str:
        return "\n".join([plain(raw["question"]), *sorted(plain(text) for text in raw["choices"])])

    def from_hub(self, record: Record) -> Record:
        """Turn the answer key, a letter or a digit, into an index and the options into a list of texts."""
        texts, labels = record["choices"]["text"], list(record["choices"]["label"])
        answer = labels.index(record["answerKey"])
        return {"id": record["id"], "question": record["question"], "choices": list(texts), "answer": answer}


EASY = Arc("arc_easy", "easy", "ARC-Easy")
CHALLENGE = Arc("arc_challenge", "challenge", "ARC-Challenge")  # retrieval and word co-occurrence got these wrong


def _bare(text: str) -> str:
    return text.strip().strip(".").casefold()
