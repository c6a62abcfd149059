# SPDX-License-Identifier: Apache-2.0
"""
Eight requests with eight mixtures in one batch: the same texts as one by one, and in what time?

    python benchmarks/adaptation/mixed_batch.py

Float32, greedy, the same number of new tokens for every row. Beside the mixed batch: the base model on the same batch,
and the requests one after another, the expert exchanged between them, beside the weights and merged into them. Seconds
are CPU time of one process, the least of the repeats, in each of which every way runs once.
"""

import argparse
import time

import numpy as np
import torch
from common import EXPERTS, Cell, arguments, load, parse, run_cells
from transformers import PreTrainedTokenizerBase

from peft_svf import Mixture
from peft_svf.rows import prompt_ids
from peft_svf.tasks import get_task

ROWS, REPEATS, NEW_TOKENS = 8, 2, 16


def mixtures(seed: int) -> list[Mixture]:
    """Eight that are not alike: the base, each expert, and four random ones."""
    weights = np.random.default_rng(seed).uniform(0, 0.7, (ROWS - 1 - len(EXPERTS), len(EXPERTS))).tolist()
    corners = [Mixture(), *(Mixture({name: 1.0}) for name in EXPERTS)]
    return corners + [Mixture(dict(zip(EXPERTS, row, strict=True))) for row in weights]


def texts(tokenizer: PreTrainedTokenizerBase, output: torch.Tensor, tokens: int) -> list[str]:
    return tokenizer.batch_decode(output[:, -tokens:])


def measure(args: argparse.Namespace) -> dict:
    model, tokens = load(torch.float32), NEW_TOKENS
    tokenizer, chosen = model.tokenizer, mixtures(args.seed)
    sources = ["svamp", "gsm8k", "arc_easy", "mbpp"] * (ROWS // 4)
    rows = [get_task(name).rows("test", limit=2, seed=args.seed)[i // 4] for i, name in enumerate(sources)]
    prompts = [row["prompt"] for row in rows]
    batch = tokenizer.pad({"input_ids": prompt_ids(tokenizer, prompts)}, return_tensors="pt", padding_side="left")
    alone = [torch.tensor([ids]) for ids in prompt_ids(tokenizer, prompts)]
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def together(of: list[Mixture]) -> list[str]:
        with torch.no_grad(), model.library.activate(of) as active:
            return texts(tokenizer, active.generate(**batch, **settings), tokens)

    def in_turn(merge: bool) -> list[str]:
        written = []
        for ids, mixture in zip(alone, chosen, strict=True):
            with torch.no_grad(), model.library.activate(mixture, merge=merge) as active:
                output = active.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
            written += texts(tokenizer, output, tokens)
        return written

    ways = {
        "mixed batch": lambda: together(chosen),
        "base, same batch": lambda: together([Mixture()]),
        "one by one": lambda: in_turn(False),
        "one by one, merged": lambda: in_turn(True),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    written = {}
    for _ in range(REPEATS):
        for way, run in ways.items():
            begin = time.process_time()
            written[way] = run()
            seconds[way].append(round(time.process_time() - begin, 3))
    least = {way: min(times) for way, times in seconds.items()}
    same = [a == b for a, b in zip(written["mixed batch"], written["one by one"], strict=True)]
    changed = [a != b for a, b in zip(written["mixed batch"], written["base, same batch"], strict=True)]
    return {
        "dtype": "float32",
        "rows": ROWS,
        "new_tokens": tokens,
        "mixtures": [m.alpha for m in chosen],
        "same_text_as_one_by_one": sum(same),
        "other_text_than_the_base": sum(changed),  # else equal texts would say nothing
        "CPU seconds": seconds,
        "ratio_to_base": {way: round(t / least["base, same batch"], 3) for way, t in least.items()},
        "texts": written,
    }


def cells(args: argparse.Namespace) -> list[Cell]:
    return [Cell("mixed_batch", lambda: measure(args))]


if __name__ == "__main__":
    args = parse(arguments(__doc__))
    run_cells(cells(args), args)
