# SPDX-License-Identifier: Apache-2.0
"""
Transformer² end to end on a real model: `make demo`, or `python examples/demo.py`.

SmolLM2-135M-Instruct gets three experts (reasoning, math, code) and a classifier expert, answers held-out questions in
two passes, and a table compares the ways to choose an expert. The questions of the table are in the choice form: the
answer is the likeliest of the given options. Results go to `demo_output/`.
"""

import argparse
import json
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from smollm2 import NAME, load_smollm2
from transformers import pipeline

from peft_svf import Mixture, Transformer2Model
from peft_svf.adaptation import Search
from peft_svf.evaluation import Summary, evaluate, wilson
from peft_svf.plots import draw_decisions, draw_z, new_figure
from peft_svf.tasks import get_task

HERE = Path(__file__).resolve().parent
TASKS = {"reasoning": "arc_easy", "math": "gsm8k", "code": "mbpp"}  # kind of question -> its task
SEARCH, SHOTS = Search(population=8, iterations=3, elites=0.25), 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64, help="held-out questions per task")
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    heading("1. The base model, its singular directions, the experts")
    base, tokenizer = load_smollm2()
    model = Transformer2Model(
        base, tokenizer, [HERE / "experts" / name for name in TASKS], HERE / "classifiers" / "dispatch"
    )
    experts = [model.library.expert(name) for name in model.library.names]
    print(f"{base.num_parameters() / 1e6:.0f} M parameters, ready after {time.perf_counter() - start:.0f} s")
    for expert in experts:
        numbers = sum(offset.numel() for offset in expert.offsets.values())
        print(f'  {expert.name:10} {numbers:,} multipliers  "{expert.description}"')

    heading("2. Two passes: who answers, and the text")
    rows = {
        kind: get_task(task).rows("test", limit=args.questions, folder=HERE / "data") for kind, task in TASKS.items()
    }
    answer_some(model, rows)

    heading(f"3. Accuracy on {args.questions} held-out questions of each task, choice form")
    summaries, decisions = compare(model, rows, args.out)
    print("\n" + make_table(summaries))

    name = args.out / f"demo-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    figure, axes = new_figure(3)
    draw_decisions(axes[0], decisions["prompt"], "first pass: prompt")
    draw_decisions(axes[1], decisions["classifier"], "first pass: classifier expert")
    draw_z(axes[2], experts)
    figure.savefig(name.with_suffix(".png"))
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {package: version(package) for package in ("torch", "transformers", "peft", "peft-svf")},
        "base_model": NAME,
        "form": "choice: the likeliest of the given options",
        "seconds": round(time.perf_counter() - start, 1),
        "search": {**asdict(SEARCH), "examples": SHOTS, "examples_from": "validation split"},
        "summaries": {way: {kind: s.to_json() for kind, s in kinds.items()} for way, kinds in summaries.items()},
        "decisions": decisions,
    }
    name.with_suffix(".json").write_text(json.dumps(result, indent=1))
    print(f"\nWrote {name}.json and .png after {result['seconds']:.0f} s.")


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def answer_some(model: Transformer2Model, rows: dict[str, list[dict]]) -> None:
    """Generate an answer to a question of each kind, and to one that belongs to none."""
    pipe = pipeline("transformer2", model=model, tokenizer=model.tokenizer)
    questions = [rows["reasoning"][0]["prompt"], rows["code"][-1]["prompt"]]
    for text in ("Anna has 12 apples and buys 7 more. How many apples has she now?", "Invite a neighbour to tea."):
        questions.append([{"role": "user", "content": text}])
    outputs = pipe(questions, batch_size=4, max_new_tokens=40, do_sample=False, return_dispatch=True)
    for (output,) in outputs:
        question, answer = (" ".join(message["content"].split()) for message in output["generated_text"][-2:])
        print(f"Q  {question[:110]}")
        print(f"   -> {output['dispatch']['choice']} (confidence {output['dispatch']['confidence']:.2f})")
        print(f"A  {answer[:160]}\n")


def compare(model: Transformer2Model, rows: dict[str, list[dict]], out: Path) -> tuple[dict, dict]:
    """Score every way to choose an expert on every task; also return what the first passes decided."""
    ways = {"other": "base"} | {name: f"expert {name}" for name in model.library.names}
    summaries: dict[str, dict[str, Summary]] = {way: {} for way in ways.values()}
    decisions: dict[str, dict[str, dict[str, int]]] = {"prompt": {}, "classifier": {}}
    for name, way in ways.items():
        for kind, questions in rows.items():
            with model.using({name: 1.0}) as active:
                summaries[way][kind] = evaluate(active, model.tokenizer, questions)
            progress(way, summaries[way][kind])
    for strategy in decisions:
        way = f"Transformer², {strategy}"
        summaries[way] = {}
        for kind, questions in rows.items():
            mixtures = model.first_pass([row["prompt"] for row in questions], first_pass=strategy)
            choices = [mixture.choice for mixture in mixtures]
            decisions[strategy][kind] = dict(Counter(choices))
            # one expert answers each row, so its answer is already known from above
            records = [summaries[ways[name]][kind].records[i] for i, name in enumerate(choices)]
            right = sum(record["right"] for record in records)
            scores = {"accuracy": right / len(records), "interval": wilson(right, len(records)), "records": records}
            summaries[way][kind] = replace(summaries["base"][kind], seconds=0.0, **scores)
            progress(way, summaries[way][kind])
    way = "Transformer², few-shot"
    summaries[way] = {}
    for kind, questions in rows.items():
        mixture = few_shot_mixture(model, kind, out / f"mixture-{kind}.json")
        with model.using(mixture) as active:
            summaries[way][kind] = evaluate(active, model.tokenizer, questions)
        progress(way, summaries[way][kind], f"  {dict(mixture.alpha) or 'the base alone'}")
    return summaries, decisions


def few_shot_mixture(model: Transformer2Model, kind: str, path: Path) -> Mixture:
    """Search a mixture on a few validation rows, or read the one that an earlier run found."""
    if path.exists():
        return Mixture.load(path)
    shots = get_task(TASKS[kind]).rows("validation", limit=SHOTS, folder=HERE / "data")
    mixture = model.adapt(shots, search=SEARCH)
    mixture.save(path)
    return mixture


def progress(way: str, summary: Summary, more: str = "") -> None:
    print(f"  {way:24} {summary.task:10} {summary.accuracy:.3f}{more}", flush=True)


def make_table(summaries: dict[str, dict[str, Summary]]) -> str:
    """Lay out accuracies with 95 % intervals, one way to choose a line."""
    lines = [" " * 24 + "".join(f"{f'{kind} ({task})':>24}" for kind, task in TASKS.items())]
    for way, kinds in summaries.items():
        cells = [f"{s.accuracy:.3f} [{s.interval[0]:.2f}, {s.interval[1]:.2f}]" for s in kinds.values()]
        lines.append(f"{way:24}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
