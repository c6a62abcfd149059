# SPDX-License-Identifier: Apache-2.0
"""
Do the experts of one model help another? (arXiv 2501.06252, section 4.4)

    python benchmarks/adaptation/transfer.py                                       # SmolLM2-135M -> its sibling
    python benchmarks/adaptation/transfer.py --target B --out results/b            # SmolLM2-135M -> another model
    python benchmarks/adaptation/transfer.py --source A --target B --experts FOLDER FOLDER --out results/a-b

The sibling is SmolLM2-135M after a short full fine-tuning on GSM8K's solutions: no second pre-trained model of equal
shape is at hand, and one that went its own way is a harder test. Ways: the i-th number to the i-th singular value
("ordered"), the same numbers shuffled (three seeds, the control), matched directions ("aligned"), and a few-shot
search over the ordered ones. Models of the Hub or of folders go the same way; where widths or depths differ, z-vectors
are interpolated and nothing is aligned.
"""

import argparse
import functools
import hashlib
import json
import time
from pathlib import Path

import torch
from common import FOLDERS, ROOT, Cell, arguments, parse, questions, results_folder, run_cells, score
from smollm2 import load_smollm2, smollm2_folder
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peft_svf import Expert, Transformer2Model
from peft_svf.adaptation import Search
from peft_svf.experts.transfer import transfer_expert
from peft_svf.rows import prompt_text
from peft_svf.tasks import get_task
from peft_svf.training.result import write_file

TASKS = {"arc_easy": 300, "gsm8k": 200, "mbpp": 150}  # test rows of the experts' own tasks, the cheap ones first
SHUFFLES = 3
WAYS = ("ordered", *(f"shuffled-{seed}" for seed in range(SHUFFLES)), "aligned")
SEARCH = {"population": 8, "iterations": 3, "elites": 0.25}
SHOTS = 5
STRETCHED = {"lengths": "interpolate", "depths": "interpolate"}  # nothing where the shapes are equal
# Of the sibling's fine-tuning. At a rate of 5e-5 weights move by 0.2 % of their norm, as much as bfloat16 rounds.
BATCH, TOKENS, RATE = 2, 192, 3e-4


def sibling(args: argparse.Namespace) -> tuple[Path, dict]:
    """
    The folder of the sibling and how it was made; made where it is not there yet.

    All weights are fine-tuned on solutions of GSM8K's training split, the loss on the solution alone.
    """
    settings = {"steps": args.steps, "batch": BATCH, "tokens": TOKENS, "rate": RATE, "seed": args.seed}
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    folder = ROOT / "runs" / "adaptation" / f"sibling-{name}"
    written = folder / "sibling.json"
    if written.exists():
        return folder, json.loads(written.read_text())
    model, tokenizer = load_smollm2(torch.float32)
    rows, losses = get_task("gsm8k").load("train"), []
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 2}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    model.train()
    for step in range(args.steps):
        batch = [encode(tokenizer, rows[i]) for i in order[step * BATCH : (step + 1) * BATCH]]
        with torch.autocast("cpu", torch.bfloat16):  # weights and their steps stay in float32
            loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in batch) / BATCH
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        print(f"  step {step + 1} of {args.steps}: loss {losses[-1]:.3f}", flush=True)
    with torch.no_grad():
        named = [(p, before[n]) for n, p in model.named_parameters() if n in before]
        moved = [((now - then).norm() / then.norm()).item() for now, then in named]
    model.to(torch.bfloat16).save_pretrained(folder)
    change = {"mean": sum(moved) / len(moved), "largest": max(moved)}
    result = {"settings": settings, "data": "gsm8k, train", "losses": losses, "relative change of a weight": change}
    write_file(written, json.dumps(result))  # last: its presence means that the checkpoint is whole
    return folder, result


def encode(tokenizer: PreTrainedTokenizerBase, row: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """One solved problem as ids and labels `(1, tokens)`."""
    prompt = tokenizer(prompt_text(tokenizer, [{"role": "user", "content": row["question"]}])).input_ids
    answer = tokenizer(str(row["answer"]), add_special_tokens=False).input_ids
    ids = [*prompt, *answer, tokenizer.eos_token_id]
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    return torch.tensor([ids[:TOKENS]]), torch.tensor([labels[:TOKENS]])


class Pair:
    """Both models with their experts, each made when it is first needed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folders = {Path(folder).name: folder for folder in args.experts} if args.experts else FOLDERS

    @functools.cached_property
    def experts(self) -> dict[str, Expert]:
        return {name: Expert.load(folder, name) for name, folder in self.folders.items()}

    @functools.cached_property
    def source(self) -> Transformer2Model:
        if self.args.source is None:
            model, tokenizer = load_smollm2()
        else:
            model = AutoModelForCausalLM.from_pretrained(self.args.source, dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(self.args.source)
        return Transformer2Model(model, tokenizer, self.experts)

    @functools.cached_property
    def target(self) -> Transformer2Model:
        folder = self.args.target or sibling(self.args)[0]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model.name_or_path = str(self.args.target or "sibling")
        tokenizer = AutoTokenizer.from_pretrained(self.args.target) if self.args.target else self.source.tokenizer
        first = next(iter(self.experts))
        expert = transfer_expert(self.experts[first], self.source.library.model, model, "ordered", **STRETCHED)
        return Transformer2Model(model, tokenizer, {f"{first} ordered": expert})

    def moved(self, kind: str, way: str) -> Expert:
        """An expert of the source, given to the target and known there as "math ordered"."""
        name, library = f"{kind} {way}", self.target.library
        if name not in library.names:
            mode, _, seed = way.partition("-")
            one, other = self.source.library.model, library.model
            moved = transfer_expert(self.experts[kind], one, other, mode, seed=int(seed or 0), name=name, **STRETCHED)
            library.add(moved)
        return library.expert(name)

    def on_source(self, task: str, alpha: dict[str, float]) -> dict:
        return score(self.source, rows_of(task, self.args), alpha)

    def on_target(self, task: str, kind: str, way: str) -> dict:
        """The target with one expert that was transferred one way, or as it is."""
        rows = rows_of(task, self.args)
        if way == "base":
            return score(self.target, rows, {})
        cosines = self.moved(kind, way).provenance.get("mean_abs_cosine", {})
        aligned = {"mean_abs_cosine": sum(cosines.values()) / len(cosines)} if cosines else {}
        return {**aligned, **score(self.target, rows, {f"{kind} {way}": 1.0})}

    def few_shot(self, task: str) -> dict:
        """A search over all ordered experts on a few validation questions, tested on the target."""
        experts = {kind: self.moved(kind, "ordered") for kind in self.experts}
        model = Transformer2Model(self.target.library.model, self.target.tokenizer, experts)  # on the same weights
        split = "validation" if "validation" in get_task(task).files else "train"
        shots = get_task(task).rows(split, limit=SHOTS, seed=self.args.seed)
        begin = time.process_time()
        mixture = model.adapt(shots, search=Search(seed=self.args.seed, **SEARCH))
        seconds = time.process_time() - begin
        found = {"alpha": mixture.alpha, "fell_back": mixture.provenance["held_out"]["fell_back"]}
        found |= {"adapting_cpu_seconds": round(seconds, 1), "tokens_read": mixture.provenance["tokens"]}
        return {**found, **score(model, rows_of(task, self.args), mixture.alpha)}


def rows_of(task: str, args: argparse.Namespace) -> list[dict]:
    return questions(task, TASKS[task], args)


def tasks_of(pair: Pair) -> dict[str, str]:
    """The task of each expert: what its result file says it was trained on."""
    written = {kind: Path(folder) / "result.json" for kind, folder in pair.folders.items()}
    return {kind: json.loads(path.read_text())["task"] for kind, path in written.items()}


def cells(args: argparse.Namespace) -> list[Cell]:
    pair = Pair(args)
    made = [] if args.target else [Cell("transfer-sibling", lambda: sibling(args)[1])]
    for task, kind in sorted(((t, k) for k, t in tasks_of(pair).items()), key=lambda pair: list(TASKS).index(pair[0])):
        ways = {"source-base": (pair.on_source, task, {}), "source-expert": (pair.on_source, task, {kind: 1.0})}
        ways |= {f"target-{way}": (pair.on_target, task, kind, way) for way in ("base", *WAYS)}
        if args.target and shape(args.target) != shape(args.source or smollm2_folder()):
            del ways["target-aligned"]
        ways["target-few_shot"] = (pair.few_shot, task)
        made += [Cell(f"transfer-{task}-{way}", functools.partial(*call)) for way, call in ways.items()]
    return made


def shape(model: str | Path) -> dict:
    """What has to be equal for directions to be matched."""
    config = AutoConfig.from_pretrained(model)
    return {name: getattr(config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}


def parser(doc: str) -> argparse.ArgumentParser:
    made = arguments(doc)
    made.add_argument("--source", help="Hub id or folder; default SmolLM2-135M, whose experts lie in examples/")
    made.add_argument("--target", help="the same, of any shape; default the sibling, which is made in the first cell")
    made.add_argument("--experts", nargs="+", help=f"folders of experts of the source, of {', '.join(TASKS)}")
    made.add_argument("--steps", type=int, default=30, help="of the sibling's fine-tuning")
    return made


if __name__ == "__main__":
    args = parse(parser(__doc__))
    if bool(args.source) != bool(args.experts) or (args.source and not args.target):
        raise SystemExit("Give --source with --experts and --target, --target alone, or none of them.")
    if args.target and args.out == results_folder():
        raise SystemExit("Results of another pair need a folder of their own: give --out.")
    run_cells(cells(args), args)
