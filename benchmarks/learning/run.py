# SPDX-License-Identifier: Apache-2.0
"""
Does it learn, and does it learn as well as LoRA? One cell is a task, a method, a learning rate and a seed.

    python benchmarks/learning/run.py                 # every cell of cells.json that has no result yet, in its order
    python benchmarks/learning/run.py --list          # what is done, what is missing
    python benchmarks/learning/run.py --only svf-mlp  # the cells whose name contains this

All methods see the same questions in the same order, the same number of sampled answers and the same test rows; only
the adapter and its learning rate differ. An interrupted cell goes on from its last checkpoint (runs/learning). Each
cell writes results/<cell>.json once; report.py makes the page from these files.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
sys.path.insert(0, str(HERE.parents[1] / "examples"))  # smollm2.py


@dataclass(frozen=True)
class Cell:
    """One training run; `lr` 0 and method "base" is the untrained model on the test rows."""

    task: str
    method: str
    lr: float
    seed: int
    steps: int = 30
    questions: int = 16
    samples: int = 16
    test_rows: int = 1000

    @property
    def name(self) -> str:
        return f"{self.task}-{self.method}" + (f"-lr{self.lr:g}-seed{self.seed}" if self.lr else "")


def adapter(method: str) -> Any:
    """The PEFT config of a method. Targets are the MLP weights ("mlp"), attention q and v ("qv") or all of these."""
    from peft import IA3Config, LoraConfig, TinyLoraConfig

    from peft_svf import SVFConfig

    mlp, qv = ["gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj"]
    kind, _, where = method.partition("-")
    targets = {"mlp": mlp, "qv": qv, "both": mlp + qv, "all": "all-linear"}[where]
    if kind == "svf":
        return SVFConfig(task_type="CAUSAL_LM", target_modules=targets, basis_dtype="bfloat16")
    if kind == "lora16":
        return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=16, lora_alpha=32)
    if kind == "tinylora":
        return TinyLoraConfig(task_type="CAUSAL_LM", target_modules=targets)
    if kind == "ia3":
        inside = [name for name in targets if name == "down_proj"]
        return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=inside)
    raise SystemExit(f"There is no method {method!r}.")


def run(cell: Cell) -> None:
    """Train and test one cell; the result is written last."""
    from datasets import Dataset
    from smollm2 import load_smollm2
    from transformers.trainer_utils import get_last_checkpoint

    from peft_svf.evaluation import evaluate
    from peft_svf.tasks import get_task
    from peft_svf.training import ReinforceConfig, ReinforceTrainer

    model, tokenizer = load_smollm2()
    task = get_task(cell.task)
    test = task.rows("test", "choice", limit=cell.test_rows)
    result: dict[str, Any] = {"cell": vars(cell) | {"name": cell.name}}
    if cell.method == "base":
        result["test"] = evaluate(model, tokenizer, test, 16).to_json(records=True)
    else:
        folder = Path("runs/learning") / cell.name
        config = ReinforceConfig(
            output_dir=str(folder),
            max_steps=cell.steps,
            per_device_train_batch_size=cell.questions * cell.samples,
            per_device_eval_batch_size=16,
            num_generations=cell.samples,
            learning_rate=cell.lr,
            warmup_steps=2,
            max_grad_norm=1.0,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=10,
            save_strategy="steps",
            save_steps=10,
            save_total_limit=2,
            load_best_model_at_end=True,
            report_to="none",
            bf16=False,
            seed=cell.seed,
        )
        trainer = ReinforceTrainer(
            model,
            task.reward,
            config,
            Dataset.from_list(task.rows("train", "choice", seed=cell.seed)),
            eval_dataset=Dataset.from_list(task.rows("validation", "choice", limit=160)),
            processing_class=tokenizer,
            peft_config=adapter(cell.method),
        )
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
        history = trainer.state.log_history
        result |= {
            "trainable": trained,
            "answers": cell.steps * cell.questions * cell.samples,
            "seconds": round(time.perf_counter() - start),
            "step_seconds": [entry["step_time"] for entry in history if "step_time" in entry],
            "best_step": trainer.state.best_global_step,
            "best_validation": max(entry["eval_reward"] for entry in history if "eval_reward" in entry),
            "test": evaluate(trainer.model, tokenizer, test, 16).to_json(records=True),
            "curve": [entry for entry in history if "reward" in entry or "eval_reward" in entry],
        }
    result["test"]["records"] = [[r["id"], int(r["right"])] for r in result["test"]["records"]]
    result["command"] = f"python benchmarks/learning/run.py --only {cell.name}"
    result["versions"] = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "peft-svf")}
    RESULTS.mkdir(exist_ok=True)
    partial = RESULTS / f"{cell.name}.json.partial"
    partial.write_text(json.dumps(result, indent=1))
    partial.rename(RESULTS / f"{cell.name}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the name of the cells to run")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # run this one here; the loop below starts a process each
    args = parser.parse_args()
    cells = [Cell(**entry) for entry in json.loads((HERE / "cells.json").read_text())]
    for cell in cells:
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
