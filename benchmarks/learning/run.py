# SPDX-License-Identifier: Apache-2.0
"""
Does it learn, and does it learn as well as LoRA? One cell is a task, a learner, a method, a learning rate and a seed.

    python benchmarks/learning/run.py                 # every cell of cells.json that has no result yet, in its order
    python benchmarks/learning/run.py --list          # what is done, what is missing
    python benchmarks/learning/run.py --only svf-mlp  # the cells whose name contains this

All see the same questions in the same order, the same number of steps and the same test rows. An interrupted cell goes
on from its last checkpoint (runs/learning). Each cell writes results/<cell>.json once; report.py makes the page from
these files.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cells import HERE, RESULTS, Cell, read_cells

EXAMPLES = HERE.parents[1] / "examples"  # smollm2.py


def load() -> tuple[Any, Any]:
    """The base model of the benchmark and its tokenizer."""
    sys.path.insert(0, str(EXAMPLES))
    from smollm2 import load_smollm2

    return load_smollm2()


def run(cell: Cell, base: Callable[[], tuple[Any, Any]] = load, results: Path = RESULTS) -> None:
    """Train and test one cell; the result is written last."""
    from learners import train

    from peft_svf.evaluation import evaluate
    from peft_svf.tasks import get_task
    from peft_svf.training.run import last_checkpoint

    code = source()
    model, tokenizer = base()
    task = get_task(cell.task)
    test = task.rows("test", "choice", limit=cell.test_rows)
    result: dict[str, Any] = {"cell": vars(cell) | {"name": cell.name}}
    if cell.method != "base":
        folder = Path("runs/learning") / cell.name
        trainer = train(cell, model, tokenizer, task, str(folder))
        model = trainer.model
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(last_checkpoint(folder)) if _resumes(folder) else None)
        history = trainer.state.log_history
        kept = [{k: v for k, v in entry.items() if not k.startswith("z/model")} for entry in history]
        result |= {
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "answers": cell.steps * cell.questions * (1 if cell.learner == "sft" else cell.samples),
            "seconds": round(time.perf_counter() - start),
            "best_step": trainer.state.best_global_step,
            "best_validation": max(entry["eval_reward"] for entry in history if "eval_reward" in entry),
            "curve": [entry for entry in kept if {"reward", "eval_reward", "loss"} & set(entry)],
        }
    result["test"] = evaluate(model, tokenizer, test, 16).to_json(records=True)
    result["test"]["records"] = [[r["id"], int(r["right"])] for r in result["test"]["records"]]
    result["command"] = f"python benchmarks/learning/run.py --only {cell.name}"
    result["versions"] = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "peft-svf")}
    result["source"] = code
    results.mkdir(exist_ok=True)
    partial = results / f"{cell.name}.json.partial"
    partial.write_text(json.dumps(result, indent=1))
    partial.rename(results / f"{cell.name}.json")


def _resumes(folder: Path) -> bool:
    return any(folder.glob("checkpoint-*/trainer_state.json"))


def source() -> str:
    """Which code made a result: the beginning of the sha256 of the package's files."""
    import peft_svf

    folder = Path(peft_svf.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the name of the cells to run")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # run this one here; the loop below starts a process each
    args = parser.parse_args()
    for cell in read_cells():
        done = (RESULTS / f"{cell.name}.json").exists()
        if args.cell == cell.name:
            run(cell)
        elif args.list:
            print("done   " if done else "missing", cell.name)
        elif args.cell is None and args.only in cell.name and not done:
            print("running", cell.name, flush=True)
            if subprocess.run([sys.executable, __file__, "--cell", cell.name]).returncode:
                print("failed ", cell.name, flush=True)


if __name__ == "__main__":
    main()
