# SPDX-License-Identifier: Apache-2.0
"""
Transformer² end to end on a real model: `make demo`, or `python examples/demo.py`.

SmolLM2-135M-Instruct gets three z-vector experts (reasoning, math, code) and a classifier expert, all trained by
`examples/train_expert.py`; it answers held-out questions in two passes, and a table compares the ways to choose an
expert. Questions are of the choice form: the answer is the likeliest of the given options. Results go to
`demo_output/`; a mixture found by few-shot search is kept there and used again.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from smollm2 import NAME, load_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import peft_svf
from peft_svf import Expert, Mixture, Transformer2Model
from peft_svf.adaptation import Search
from peft_svf.evaluation import Summary, evaluate, wilson
from peft_svf.plots import draw_decisions, draw_spectrum, new_figure
from peft_svf.tasks import get_task
from peft_svf.tuner.cache import usage

HERE = Path(__file__).resolve().parent
TASKS = {"reasoning": "arc_easy", "math": "gsm8k", "code": "mbpp"}  # kind of question -> task it is taken from
SEARCH = Search(population=8, iterations=3, elites=0.25)
SHOTS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="another base model; the experts of this folder are refused on it")
    parser.add_argument("--questions", type=int, default=64, help="held-out questions per task")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    parser.add_argument("--data", type=Path, help="default: PEFT_SVF_DATA, else the questions beside this file")
    args = parser.parse_args()
    start = time.perf_counter()

    heading("1. The base model, its singular directions, the experts")
    if args.model:
        print(f"The experts belong to the bits of {NAME}. On {args.model} they are refused unless these are the same.")
        base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    else:
        base, tokenizer = load_smollm2()
    experts = [Expert.load(HERE / "experts" / name) for name in TASKS]
    classifier = Expert.load(HERE / "classifiers" / "dispatch")
    since = time.perf_counter()
    model = Transformer2Model(base, tokenizer, experts, classifier)
    entries, size = usage()
    print(
        f"{base.num_parameters() / 1e6:.0f} M parameters; bases of {len(experts[0].offsets)} weights in "
        f"{time.perf_counter() - since:.1f} s (cache: {entries} entries, {size / 1e6:.0f} MB)"
    )
    for expert in [*experts, classifier]:
        numbers = sum(offset.numel() for offset in expert.offsets.values())
        print(f'  {expert.name:10} {numbers:,} multipliers  "{expert.description}"')

    heading("2. Two passes on held-out questions")
    rows = {kind: held_out(task, args) for kind, task in TASKS.items()}
    answer_some(model, tokenizer, rows)

    heading("3. Who should answer? Accuracy on held-out questions, choice form")
    summaries, decisions = compare(model, tokenizer, rows, args)
    cards = {kind: json.loads((HERE / "experts" / kind / "result.json").read_text()) for kind in TASKS}
    table = make_table(summaries, cards)
    print(table)

    args.out.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    figure, axes = new_figure(3)
    draw_decisions(axes[0], decisions["prompt"], "first pass: prompt")
    draw_decisions(axes[1], decisions["classifier"], "first pass: classifier expert")
    draw_spectrum(axes[2], [*experts, classifier])
    figure.savefig(args.out / f"demo-{stamp}.png")
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")}
        | {"peft_svf": peft_svf.__version__},
        "base_model": args.model or NAME,
        "form": "choice: the likeliest of the given options",
        "seconds": round(time.perf_counter() - start, 1),
        "search": {**asdict(SEARCH), "examples": SHOTS, "examples_from": "validation split"},
        "summaries": {way: {kind: s.to_json() for kind, s in of.items()} for way, of in summaries.items()},
        "decisions": decisions,
    }
    (args.out / f"demo-{stamp}.json").write_text(json.dumps(result, indent=1))
    print(f"\nWrote {args.out}/demo-{stamp}.json and .png after {time.perf_counter() - start:.0f} s.")


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def held_out(task: str, args: argparse.Namespace) -> list[dict]:
    """Rows of a task's test split, which no expert was trained on."""
    return get_task(task).rows("test", limit=args.questions, folder=args.data or data_folder())


def data_folder() -> Path | None:
    return None if os.environ.get("PEFT_SVF_DATA") else HERE / "data"


def answer_some(model: Transformer2Model, tokenizer, rows: dict[str, list[dict]]) -> None:
    """Generate answers to one question of each kind, and to one that belongs to none."""
    pipe = pipeline("transformer2", model=model, tokenizer=tokenizer)
    questions = [rows["reasoning"][0]["prompt"], rows["code"][1]["prompt"]]
    questions += [[{"role": "user", "content": "Anna has 12 apples and buys 7 more. How many apples has she now?"}]]
    questions += [[{"role": "user", "content": "Write two friendly sentences to invite a neighbour to tea."}]]
    outputs = pipe(questions, batch_size=4, max_new_tokens=40, do_sample=False, return_dispatch=True)
    for (output,) in outputs:
        asked, answered = output["generated_text"][-2]["content"], output["generated_text"][-1]["content"]
        found = output["dispatch"]
        shares = ", ".join(f"{name} {p:.2f}" for name, p in found["probabilities"].items())
        print(f"Q  {' '.join(asked.split())[:110]}")
        print(f"   -> {found['choice']} (confidence {found['confidence']:.2f}; {shares})")
        print(f"A  {' '.join(answered.split())[:160]}\n")


def compare(model, tokenizer, rows: dict[str, list[dict]], args) -> tuple[dict, dict]:
    """Score every way to choose an expert on every task: accuracies, and what the first passes decided."""
    ways = {"other": "base"} | {name: f"expert {name}" for name in model.library.names}
    summaries: dict[str, dict[str, Summary]] = {}
    decisions: dict[str, dict[str, dict[str, int]]] = {"prompt": {}, "classifier": {}}
    for name, way in ways.items():
        summaries[way] = {}
        for kind, questions in rows.items():
            with model.using({name: 1.0}) as active:
                summaries[way][kind] = evaluate(active, tokenizer, questions, args.batch_size)
            progress(way, kind, summaries[way][kind])
    for strategy in ("prompt", "classifier"):
        way = f"Transformer², {strategy}"
        summaries[way] = {}
        for kind, questions in rows.items():
            chosen = [m.choice for m in model.first_pass([q["prompt"] for q in questions], first_pass=strategy)]
            decisions[strategy][kind] = dict(Counter(chosen))
            # each row is answered by one expert alone: as that expert answered it above
            answered = [summaries[ways[name]][kind].records[i] for i, name in enumerate(chosen)]
            summaries[way][kind] = summarise(kind, answered)
            progress(way, kind, summaries[way][kind])
    way = "Transformer², few-shot"
    summaries[way] = {}
    for kind, questions in rows.items():
        mixture = few_shot_mixture(model, kind, args)
        with model.using(mixture) as active:
            summaries[way][kind] = evaluate(active, tokenizer, questions, args.batch_size)
        shares = ", ".join(f"{name} {weight:.2f}" for name, weight in mixture.alpha.items()) or "the base alone"
        progress(way, kind, summaries[way][kind], f"  mixture: {shares}")
    return summaries, decisions


def few_shot_mixture(model: Transformer2Model, kind: str, args) -> Mixture:
    """Search a mixture on a few validation rows, or read the one that an earlier run has found."""
    path = args.out / f"mixture-{kind}.json"
    if path.exists():
        return Mixture.load(path)
    shots = get_task(TASKS[kind]).rows("validation", limit=SHOTS, folder=args.data or data_folder())
    mixture = model.adapt(shots, search=SEARCH, batch_size=args.batch_size)
    mixture.save(path)
    return mixture


def summarise(kind: str, records: list[dict]) -> Summary:
    right = sum(record["right"] for record in records)
    interval = wilson(right, len(records))
    return Summary(TASKS[kind], "choice", len(records), right / len(records), interval, 0.0, records)


def progress(way: str, kind: str, summary: Summary, more: str = "") -> None:
    print(f"  {way:24} {kind:10} {summary.accuracy:.3f}{more}", flush=True)


def make_table(summaries: dict, cards: dict) -> str:
    """Lay the accuracies out beside the full-split numbers of the experts' cards."""
    n = next(iter(summaries["base"].values())).n
    lines = [f"\n{'':24}" + "".join(f"{kind + ' (' + TASKS[kind] + ')':>24}" for kind in TASKS)]
    for way, of in summaries.items():
        cells = [f"{s.accuracy:.3f} [{s.interval[0]:.2f}, {s.interval[1]:.2f}]" for s in of.values()]
        lines.append(f"{way:24}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append(f"\nn = {n} per task at most, 95 % intervals. On the full test splits (cards):")
    for kind, card in cards.items():
        low, high = card["gain_interval"]
        lines.append(
            f"  {kind:10} n={card['expert']['n']:<5} base {card['base']['accuracy']:.3f}  expert "
            f"{card['expert']['accuracy']:.3f}  gain {card['gain']:+.3f} [{low:+.3f}, {high:+.3f}]"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
