# SPDX-License-Identifier: Apache-2.0
"""
A model that finds its own expert, in generated text: `make demo`, or `python examples/demo.py`.

SmolLM2-135M-Instruct answers held-out questions with and without the experts beside this file. A first pass reads each
request and picks an expert, or none. Answers are shown side by side, right or wrong; a table counts more of them.
Results go to `demo_output/`.
"""

import argparse
import json
import shlex
import sys
import time
from collections import Counter
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from smollm2 import NAME, load_smollm2
from transformers import pipeline

from peft_svf.evaluation import wilson
from peft_svf.tasks import jsonl_task

HERE = Path(__file__).resolve().parent
EXPERTS = sorted(folder.name for folder in (HERE / "experts").iterdir() if folder.is_dir())
EVERYDAY = (
    "Suggest three names for a small bakery by the sea.",
    "Give me three tips for sleeping better.",
    "What is the capital of Italy?",
    "Write a short thank-you note to my teacher.",
)
SHOWN = 2  # questions of each task whose answers are printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16, help="held-out questions per task")
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    heading("1. The base model and its experts")
    # float32 on a CPU: many have no bfloat16 instructions, and take four times as long without
    base, tokenizer = load_smollm2(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    pipe = pipeline("transformer2", model=base, tokenizer=tokenizer, experts=[HERE / "experts" / n for n in EXPERTS])
    library = pipe.model.library
    print(f"{base.num_parameters() / 1e6:.0f} M parameters, ready after {time.perf_counter() - start:.0f} s")
    for name in library.names:
        expert = library.expert(name)
        numbers = sum(offset.numel() for offset in expert.offsets.values())
        print(f'  {name:10} {numbers:,} multipliers  "{expert.description}"')

    heading("2. The same questions, without and with a first pass")
    tasks = {name: jsonl_task(HERE / "data" / "requests" / name) for name in EXPERTS}
    table = {name: compare(pipe, task, args.questions) for name, task in tasks.items()}
    decisions = {name: row.pop("decisions") for name, row in table.items()}
    decisions["everyday"] = everyday(pipe)

    heading(f"3. Greedy answers that are right, of {args.questions} held-out questions of each task")
    print(f"{'':12}{'base':>22}{'with first pass':>22}   who answered")
    for name, row in table.items():
        cells = "".join(f"{row[way]['accuracy']:>8.3f} [{low:.2f}, {high:.2f}]" for way in ("base", "routed")
                        for low, high in [row[way]["interval"]])  # fmt: skip
        print(f"{name:12}{cells}   {decisions[name]}")
    print(f"{'everyday':12}{'':44}   {decisions['everyday']}")

    path = args.out / f"demo-{datetime.now().strftime('%Y%m%d-%H%M%S')}.json"
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {package: version(package) for package in ("torch", "transformers", "peft", "peft-svf")},
        "base_model": NAME,
        "seconds": round(time.perf_counter() - start, 1),
        "questions": args.questions,
        "tasks": table,
        "decisions": decisions,
    }
    path.write_text(json.dumps(result, indent=1))
    print(f"\nWrote {path} after {result['seconds']:.0f} s.")


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def answer(pipe: Any, prompts: list, tokens: int, **kwargs: Any) -> tuple[list[str], list[str]]:
    """Return greedy answers and who gave them."""
    settings = {"batch_size": len(prompts), "max_new_tokens": tokens, "do_sample": False, "return_dispatch": True}
    outputs = [output for (output,) in pipe(prompts, **settings, **kwargs)]
    texts = [" ".join(output["generated_text"][-1]["content"].split()) for output in outputs]
    return texts, [output["dispatch"]["choice"] for output in outputs]


def compare(pipe: Any, task: Any, count: int) -> dict[str, Any]:
    """Answer held-out questions of a task by the base and by what the first pass chooses; print some."""
    rows = task.rows("test", "generate", limit=count)
    prompts = [row["prompt"] for row in rows]
    before, _ = answer(pipe, prompts, 16, expert="other")
    after, choices = answer(pipe, prompts, 16)
    right = {
        way: [task.score(text, row) == 1 for text, row in zip(texts, rows, strict=True)]
        for way, texts in (("base", before), ("routed", after))
    }
    for i, row in enumerate(rows[:SHOWN]):
        print(f"Q  {' '.join(row['prompt'][-1]['content'].split())}")
        print(f"   {'base':10} {'right' if right['base'][i] else 'wrong'}  {before[i]}")
        print(f"   {choices[i]:10} {'right' if right['routed'][i] else 'wrong'}  {after[i]}\n", flush=True)
    scores = {
        way: {"accuracy": sum(marks) / len(marks), "interval": wilson(sum(marks), len(marks))}
        for way, marks in right.items()
    }
    return {**scores, "decisions": dict(Counter(choices))}


def everyday(pipe: Any) -> dict[str, int]:
    """Answer requests that no expert is for; the base's own answers are what is expected."""
    texts, choices = answer(pipe, [[{"role": "user", "content": text}] for text in EVERYDAY], 32)
    for question, text, choice in zip(EVERYDAY, texts, choices, strict=True):
        print(f"Q  {question}\n   {'base' if choice == 'other' else choice:10} {text}\n", flush=True)
    return dict(Counter(choices))


if __name__ == "__main__":
    main()
