# SPDX-License-Identifier: Apache-2.0
"""
Result files of run.py -> docs/results/learning.md with its table and curves. Every number comes from a result file.

    python benchmarks/learning/report.py
"""

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from run import HERE, RESULTS, Cell

from peft_svf.evaluation import NINETY_FIVE
from peft_svf.plots import new_figure

PAGE = HERE.parents[1] / "docs" / "results" / "learning.md"
NAMES = {
    "svf-mlp": "SVF, MLP",
    "svf-qv": "SVF, attention q and v",
    "svf-both": "SVF, MLP and q, v",
    "lora16-mlp": "LoRA r=16, MLP",
    "lora16-all": "LoRA r=16, all linear",
    "ia3-mlp": "IA3, MLP",
    "tinylora-mlp": "TinyLoRA, MLP",
}


def paired(result: dict[str, Any], base: dict[str, Any]) -> tuple[float, float]:
    """Mean and 95 % half-width of the paired difference in accuracy."""
    before = dict(base["test"]["records"])
    gaps = [right - before[row] for row, right in result["test"]["records"]]
    return statistics.mean(gaps), NINETY_FIVE * statistics.pstdev(gaps) / math.sqrt(len(gaps))


def table(cells: list[Cell], found: dict[str, dict[str, Any]], base: dict[str, Any]) -> list[str]:
    """One line per cell, missing ones too."""
    lines = [
        "| method | trained numbers | lr | seed | best step | validation | test | gain on the base | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in cells:
        result = found.get(cell.name)
        start = f"| {NAMES[cell.method]} | "
        if result is None:
            lines.append(start + f"| {cell.lr:g} | {cell.seed} | not run | | | | |")
            continue
        gain, half = paired(result, base)
        validation = (result["best_validation"] + 1) / 2  # of rewards +1 and -1
        lines.append(
            start
            + f"{result['trainable']:,} | {cell.lr:g} | {cell.seed} | {result['best_step']} | {validation:.3f} | "
            f"{result['test']['accuracy']:.3f} | {gain:+.3f} [{gain - half:+.3f}, {gain + half:+.3f}] | "
            f"{result['seconds'] / 60:.0f} |"
        )
    return lines


def seeds(cells: list[Cell], found: dict[str, dict[str, Any]], base: dict[str, Any]) -> list[str]:
    """Mean and spread over seeds where a method was run with several at one rate."""
    groups: dict[tuple[str, float], list[float]] = defaultdict(list)
    for cell in cells:
        if cell.name in found:
            groups[cell.method, cell.lr].append(paired(found[cell.name], base)[0])
    return [
        f"- {NAMES[method]}, lr {lr:g}: mean gain {statistics.mean(gains):+.3f} over {len(gains)} seeds "
        f"(from {min(gains):+.3f} to {max(gains):+.3f})."
        for (method, lr), gains in groups.items()
        if len(gains) > 1
    ]


def draw(task: str, cells: list[Cell], found: dict[str, dict[str, Any]]) -> Path:
    """Training reward and validation accuracy by step."""
    figure, (left, right) = new_figure(2)
    colours: dict[str, str] = {}
    for cell in cells:
        if cell.name not in found:
            continue
        curve = found[cell.name]["curve"]
        colour = colours.setdefault(cell.method, f"C{len(colours)}")
        label = NAMES[cell.method] if cell.method not in {c for c in colours if c != cell.method} else None
        steps = [(e["step"], (e["reward"] + 1) / 2) for e in curve if "reward" in e]
        checks = [(e["step"], (e["eval_reward"] + 1) / 2) for e in curve if "eval_reward" in e]
        left.plot(*zip(*steps, strict=True), color=colour, alpha=0.6, lw=1, label=label)
        right.plot(*zip(*checks, strict=True), color=colour, marker="o", alpha=0.7, label=label)
    left.set(xlabel="optimizer step", ylabel="share of sampled answers right", title=f"{task}: training")
    right.set(xlabel="optimizer step", ylabel="accuracy", title=f"{task}: validation, 160 questions")
    handles, labels = right.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    right.legend(unique.values(), unique.keys(), fontsize=7)
    path = PAGE.parent / f"learning-{task}.png"
    figure.savefig(path)
    return path


def main() -> None:
    cells = [Cell(**entry) for entry in json.loads((HERE / "cells.json").read_text())]
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Does it learn?",
        "",
        "Reinforcement learning with the same questions, sampled answers, reward (+1, -1), baseline (leave-one-out) "
        "and test rows for every method; only the adapter and its learning rate differ. SmolLM2-135M-Instruct in "
        "bfloat16 on a CPU, choice form: the policy is the softmax over the log-likelihoods of the given answers. "
        "Gains are paired over the test rows, with 95 % intervals. Times are wall clock on a machine with other work: "
        "no comparison. The cells of 2026-11-24 trained on 2251 questions, 3 of which stand in the test split too "
        "(they are left out since); one seed each, so differences between methods of a few points are no finding.",
        "",
        "Made by `python benchmarks/learning/report.py` from `benchmarks/learning/results/`; "
        "`python benchmarks/learning/run.py` runs what is missing.",
    ]
    for task in dict.fromkeys(cell.task for cell in cells):
        base = found.get(f"{task}-base")
        mine = [cell for cell in cells if cell.task == task and cell.method != "base"]
        lines += ["", f"## {task}", ""]
        if base is None:
            lines += ["The base was not run.", ""]
            continue
        low, high = base["test"]["interval"]
        steps = {(c.steps, c.questions, c.samples) for c in mine}
        shape = ", ".join(f"{s} steps of {q} questions with {k} samples" for s, q, k in steps)
        accuracy = base["test"]["accuracy"]
        lines += [f"Base {accuracy:.3f} [{low:.3f}, {high:.3f}], n = {base['test']['n']}; {shape}.", ""]
        lines += table(mine, found, base)
        if several := seeds(mine, found, base):
            lines += ["", *several]
        if any(cell.name in found for cell in mine):
            lines += ["", f"![Curves]({draw(task, mine, found).name})"]
    PAGE.write_text("\n".join(lines) + "\n")
    print(f"Wrote {PAGE}")


if __name__ == "__main__":
    main()
