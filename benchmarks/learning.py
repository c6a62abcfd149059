# SPDX-License-Identifier: Apache-2.0
"""
Does it learn, and does it learn as well as LoRA? A cell is a task, a learner, a method, a learning rate and a seed.

    python benchmarks/learning.py                 # every cell of learning_cells.json without a result, in its order
    python benchmarks/learning.py --only svf-mlp  # the cells whose name contains this
    python benchmarks/report.py                   # the page of the results

All see the same questions in the same order, as many steps and the same test rows. An interrupted cell goes on from
its last checkpoint in runs/learning. Validation, the reward of the likeliest choice, chooses the checkpoint.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from harness import RESULTS, run_trainings
from smollm2 import load_smollm2

FOLDER = RESULTS / "learning"
CELLS = Path(__file__).with_name("learning_cells.json")
CHANGES = ("steps", "questions", "samples", "beta", "baseline")  # appear in names if they aren't the usual ones
MLP, QV = ["gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj"]
TARGETS: dict[str, Any] = {"mlp": MLP, "qv": QV, "both": MLP + QV, "all": "all-linear"}


@dataclass(frozen=True)
class Training:
    """One training run; method "base" is the untrained model on the test rows."""

    task: str  # in its choice form
    method: str  # what is trained and at which of `TARGETS`, such as "svf-mlp"
    lr: float = 0.0
    seed: int = 0  # of the questions' order, of sampled answers and of an adapter's start
    learner: str = "reinforce"  # or "sft", next-token loss on the right answer, or "evolution"
    steps: int = 30
    questions: int = 16  # in each step
    samples: int = 16  # answers per question: sampled ones, or members of the population
    eval_steps: int = 10
    test_rows: int = 1000
    temperature: float = 1.0
    beta: float = 0.0
    baseline: str = "rloo"  # `advantage_estimator` of `ReinforceConfig`

    @property
    def setting(self) -> tuple[float, float]:
        """What validation chooses for a kind: learning rate and temperature."""
        return self.lr, self.temperature

    @property
    def kind(self) -> str:
        """What is compared: learner, method, budget and penalty, without setting and seed."""
        learner = "" if self.learner == "reinforce" else f"{self.learner}-"
        changed = [name for name in CHANGES if getattr(self, name) != getattr(Training, name)]
        return learner + self.method + "".join(f"-{name}{getattr(self, name)}" for name in changed)

    @property
    def name(self) -> str:
        """Stem of the result file."""
        if self.method == "base":
            return f"{self.task}-base"
        warm = f"-t{self.temperature:g}" if self.temperature != 1 else ""
        return f"{self.task}-{self.kind}-lr{self.lr:g}-seed{self.seed}{warm}"


def read_trainings() -> list[Training]:
    """Read learning_cells.json, in the order in which its cells run."""
    return [Training(**entry) for entry in json.loads(CELLS.read_text())]


def measure(cell: Training, base: Callable[[], tuple[Any, Any]] = load_smollm2) -> dict[str, Any]:
    """Train a cell, or go on with it, and test it."""
    from transformers.trainer_utils import get_last_checkpoint

    from peft_svf.evaluation import evaluate
    from peft_svf.tasks import get_task

    (model, tokenizer), task = base(), get_task(cell.task)
    result: dict[str, Any] = {"training": asdict(cell), "source": source()}
    if cell.method != "base":
        folder = Path("runs/learning") / cell.name
        trainer = trainer_of(cell, model, tokenizer, task, str(folder))
        model = trainer.model
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
        history = [{k: v for k, v in e.items() if not k.startswith("z/model")} for e in trainer.state.log_history]
        result |= {
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "answers": cell.steps * cell.questions * (1 if cell.learner == "sft" else cell.samples),
            "best_step": trainer.state.best_global_step,
            "best_validation": max(entry["eval_reward"] for entry in history if "eval_reward" in entry),
            "curve": [entry for entry in history if {"reward", "eval_reward", "loss"} & set(entry)],
        }
    test = evaluate(model, tokenizer, task.rows("test", "choice", limit=cell.test_rows), 16).to_json(records=True)
    test["records"] = [[record["id"], int(record["right"])] for record in test["records"]]
    return result | {"test": test}


def source() -> str:
    """Identify the package's code by the beginning of its sha256."""
    import peft_svf

    folder, digest = Path(peft_svf.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def adapter(method: str) -> Any:
    """Return the PEFT config of a method such as "svf-mlp"."""
    from peft import IA3Config, LoraConfig, TinyLoraConfig

    from peft_svf import SVFConfig

    kind, _, where = method.partition("-")
    config, more = {
        "svf": (SVFConfig, {}),
        "svf_rank16": (SVFConfig, {"rank": 16}),
        "svf_rank64": (SVFConfig, {"rank": 64}),
        "lora16": (LoraConfig, {"r": 16, "lora_alpha": 32}),
        "tinylora": (TinyLoraConfig, {}),
        "ia3": (IA3Config, {"feedforward_modules": [name for name in TARGETS[where] if name == "down_proj"]}),
    }[kind]
    return config(task_type="CAUSAL_LM", target_modules=TARGETS[where], **more)


def questions(cell: Training, task: Any) -> list[dict[str, Any]]:
    """List the rows that `ReinforceTrainer` reads in the cell's steps, each once, in its order."""
    from trl.trainer.utils import RepeatSampler

    rows = task.rows("train", "choice", seed=cell.seed)
    sampler = RepeatSampler(range(len(rows)), 1, batch_size=cell.questions, shuffle=True, seed=cell.seed)
    epochs = chain.from_iterable(repeat(sampler))  # each pass of the sampler is another epoch
    return [rows[i] for i in islice(epochs, cell.steps * cell.questions)]


def trainer_of(cell: Training, model: Any, tokenizer: Any, task: Any, folder: str) -> Any:
    """Make the trainer of a cell."""
    from datasets import Dataset

    from peft_svf.training import (
        EvolutionConfig,
        EvolutionTrainer,
        ReinforceConfig,
        ReinforceTrainer,
        SupervisedConfig,
        SupervisedTrainer,
    )

    common: dict[str, Any] = {
        "output_dir": folder, "max_steps": cell.steps, "per_device_eval_batch_size": 16, "learning_rate": cell.lr,
        "warmup_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": cell.eval_steps,
        "save_strategy": "steps", "save_steps": cell.eval_steps, "save_total_limit": 2,
        "load_best_model_at_end": True, "report_to": "none", "dataloader_pin_memory": False, "bf16": False,
        "seed": cell.seed,
    }  # fmt: skip
    checks = task.rows("validation", "choice", limit=160)
    ours = {"processing_class": tokenizer, "peft_config": adapter(cell.method)}
    if cell.learner == "evolution":
        args = EvolutionConfig(
            **common, per_device_train_batch_size=cell.questions, population=cell.samples, rows_per_forward=64,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        return EvolutionTrainer(model, task.reward, args, questions(cell, task), checks, **ours)
    if cell.learner == "sft":
        args = SupervisedConfig(
            **common, per_device_train_batch_size=cell.questions, retention=0.0, train_sampling_strategy="sequential"
        )
        rows, check = Dataset.from_list(questions(cell, task)), Dataset.from_list(checks)
        return SupervisedTrainer(model, args, rows, check, reward_funcs=task.reward, **ours)
    args = ReinforceConfig(
        **common, per_device_train_batch_size=cell.questions * cell.samples, num_generations=cell.samples,
        temperature=cell.temperature, beta=cell.beta, advantage_estimator=cell.baseline, max_grad_norm=1.0,
    )  # fmt: skip
    rows = Dataset.from_list(task.rows("train", "choice", seed=cell.seed))
    return ReinforceTrainer(model, task.reward, args, rows, eval_dataset=Dataset.from_list(checks), **ours)


if __name__ == "__main__":
    run_trainings(__doc__, read_trainings(), measure, FOLDER)
