# SPDX-License-Identifier: Apache-2.0
"""
Do the experts of one model help another? (arXiv 2501.06252, section 4.4)

    python benchmarks/transfer.py                                       # SmolLM2-135M -> its sibling
    python benchmarks/transfer.py --target FOLDER --out results/other   # -> another model of the same shape

The sibling is SmolLM2-135M after a short full fine-tuning on GSM8K's solutions: no second pre-trained model of equal
shape is at hand, and one that went its own way is a harder test. Ways: the i-th number to the i-th singular value
("ordered"), the same numbers shuffled (three seeds, the control), matched directions ("aligned"), and a few-shot
search over the ordered ones.
"""

import argparse
import functools
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from adaptation import FOLDERS, options, questions, score
from harness import ROOT, Cell, run_cells
from smollm2 import load_smollm2
from transformers import AutoModelForCausalLM

from peft_svf import Expert, Transformer2Model, files
from peft_svf.adaptation import Search
from peft_svf.experts import transfer_expert
from peft_svf.rows import prompt_text
from peft_svf.tasks import get_task

TASKS = {"arc_easy": ("reasoning", 300), "gsm8k": ("math", 200), "mbpp": ("code", 150)}  # expert, test rows
WAYS = ("ordered", "shuffled-0", "shuffled-1", "shuffled-2", "aligned")
# A rate of 5e-5 would move weights by 0.2 % of their norm, as much as bfloat16 rounds.
SIBLING = {"steps": 30, "batch": 2, "tokens": 192, "rate": 3e-4}


def sibling(seed: int) -> tuple[Path, dict[str, Any]]:
    """Fine-tune all weights on solutions of GSM8K, unless it is done; return the checkpoint and how it was made."""
    settings = {**SIBLING, "seed": seed}
    folder = ROOT / "runs" / "adaptation" / f"sibling-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}"
    if (folder / "sibling.json").exists():
        return folder, files.read_json(folder / "sibling.json")
    model, tokenizer = load_smollm2(torch.float32)
    rows, losses, batch = get_task("gsm8k").load("train"), [], int(SIBLING["batch"])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 2}
    optimizer = torch.optim.AdamW(model.parameters(), lr=SIBLING["rate"], weight_decay=0.0)
    for step in range(int(SIBLING["steps"])):
        pairs = [encoded(tokenizer, rows[i]) for i in order[step * batch : (step + 1) * batch]]
        with torch.autocast("cpu", torch.bfloat16):  # weights and their steps stay in float32
            loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in pairs) / batch
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
    named = dict(model.named_parameters())
    moved = [float((named[name].detach() - then).norm() / then.norm()) for name, then in before.items()]
    model.to(torch.bfloat16).save_pretrained(folder)
    change = {"mean": sum(moved) / len(moved), "largest": max(moved)}
    result = {"settings": settings, "data": "gsm8k, train", "losses": losses, "relative change of a weight": change}
    files.write(folder / "sibling.json", json.dumps(result))  # last: its presence means that the checkpoint is whole
    return folder, result


def encoded(tokenizer: Any, row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode one solved problem as ids and labels `(1, tokens)`; the loss is on the solution alone."""
    prompt = tokenizer(prompt_text(tokenizer, [{"role": "user", "content": row["question"]}])).input_ids
    ids = [*prompt, *tokenizer(str(row["answer"]), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    size = int(SIBLING["tokens"])
    return torch.tensor([ids[:size]]), torch.tensor([labels[:size]])


class Pair:
    """Both models with their experts, each loaded when it is first needed."""

    def __init__(self, target: str | None, seed: int) -> None:
        self.folder, self.seed = target, seed

    @functools.cached_property
    def source(self) -> Transformer2Model:
        """SmolLM2-135M with the experts of examples/."""
        model, tokenizer = load_smollm2()
        return Transformer2Model(model, tokenizer, {name: Expert.load(folder) for name, folder in FOLDERS.items()})

    @functools.cached_property
    def target(self) -> Transformer2Model:
        """The other model, with every expert transferred in every way."""
        folder = self.folder or sibling(self.seed)[0]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model.name_or_path = self.folder or "sibling"
        moved = {f"{kind} {way}": self.moved(model, kind, way) for kind in FOLDERS for way in WAYS}
        return Transformer2Model(model, self.source.tokenizer, moved)

    def moved(self, model: Any, kind: str, way: str) -> Expert:
        """Transfer an expert one way."""
        mode, _, seed = way.partition("-")
        source = self.source.library
        return transfer_expert(
            source.expert(kind), source.model, model, mode, seed=int(seed or 0), name=f"{kind} {way}"
        )

    def on_source(self, task: str, alone: bool) -> dict[str, Any]:
        """Score the source without or with the task's expert."""
        kind, count = TASKS[task]
        return score(self.source, questions(task, count, self.seed), {} if alone else {kind: 1.0})

    def on_target(self, task: str, way: str) -> dict[str, Any]:
        """Score the target with the task's expert in one way, or as it is."""
        kind, count = TASKS[task]
        if way == "base":
            return score(self.target, questions(task, count, self.seed), {})
        cosines = self.target.library.expert(f"{kind} {way}").provenance.get("mean_abs_cosine", {})
        aligned = {"mean_abs_cosine": sum(cosines.values()) / len(cosines)} if cosines else {}
        return {**aligned, **score(self.target, questions(task, count, self.seed), {f"{kind} {way}": 1.0})}

    def few_shot(self, task: str) -> dict[str, Any]:
        """Search over the ordered experts on five validation questions and score the result."""
        library, count = self.target.library, TASKS[task][1]
        experts = {kind: library.expert(f"{kind} ordered") for kind in FOLDERS}
        model = Transformer2Model(library.model, self.target.tokenizer, experts)  # on the same weights
        split = "validation" if "validation" in get_task(task).files else "train"
        search = Search(population=8, iterations=3, elites=0.25, seed=self.seed)
        begin = time.process_time()
        mixture = model.adapt(questions(task, 5, self.seed, split), search=search)
        result = {"alpha": mixture.alpha, "fell_back": mixture.provenance["held_out"]["fell_back"]}
        result |= {"adapting_cpu_seconds": time.process_time() - begin, "tokens_read": mixture.provenance["tokens"]}
        return {**result, **score(model, questions(task, count, self.seed), mixture.alpha)}


def cells(target: str | None, seed: int) -> list[Cell]:
    """List all cells in their order."""
    pair = Pair(target, seed)
    made = [] if target else [Cell("transfer-sibling", lambda: sibling(seed)[1])]
    for task in TASKS:
        ways: dict[str, Any] = {
            "source-base": (pair.on_source, task, True),
            "source-expert": (pair.on_source, task, False),
        }
        ways |= {f"target-{way}": (pair.on_target, task, way) for way in ("base", *WAYS)}
        ways["target-few_shot"] = (pair.few_shot, task)
        made += [Cell(f"transfer-{task}-{way}", functools.partial(*call)) for way, call in ways.items()]
    return made


def main() -> None:
    """Run the missing cells."""
    parser = options(__doc__)
    parser.add_argument("--target", help="Hub id or folder; default the sibling, which the first cell makes")
    args: argparse.Namespace = parser.parse_args()
    if args.target and args.out == parser.get_default("out"):
        parser.error("results of another target need their own folder: give --out")
    sys.exit(bool(run_cells(cells(args.target, args.seed), args.out, args.only, args.minutes, args.seed)))


if __name__ == "__main__":
    main()
