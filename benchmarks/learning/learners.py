# SPDX-License-Identifier: Apache-2.0
"""
A cell -> the trainer that runs it. All see the same questions in the same order; what is trained, and how, differs.

Each learner is a function `(cell, model, tokenizer, task, common) -> Trainer`, `common` being the settings that all
share. They are validated by one measure, the reward of the likeliest choice, logged as `eval_reward`.
"""

from collections.abc import Callable
from itertools import chain, islice, repeat
from typing import Any

import torch
from cells import Cell
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftConfig, TinyLoraConfig
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import RepeatSampler

from peft_svf import SVFConfig
from peft_svf.evaluation import evaluate
from peft_svf.tasks import Task
from peft_svf.training.evolution import EvolutionConfig, EvolutionTrainer
from peft_svf.training.reinforce import ReinforceConfig, ReinforceTrainer

MLP, QV = ["gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj"]
TARGETS: dict[str, Any] = {"mlp": MLP, "qv": QV, "both": MLP + QV, "all": "all-linear"}
SVF: dict[str, dict[str, Any]] = {
    "svf": {},
    "svf_reference": {"parametrization": "reference"},  # sigmoid mask, nuclear norm kept: the paper's code
    "svf_rank16": {"rank": 16},
    "svf_rank64": {"rank": 64},
}


def adapter(method: str) -> PeftConfig:
    """The PEFT config of a method such as "svf-mlp": what is trained, and at which of `TARGETS`."""
    kind, _, where = method.partition("-")
    if where not in TARGETS:
        raise SystemExit(f"There is no method {method!r}.")
    common = {"task_type": "CAUSAL_LM", "target_modules": TARGETS[where]}
    if kind in SVF:
        return SVFConfig(**common, basis_dtype="bfloat16", **SVF[kind])
    if kind == "lora16":
        return LoraConfig(**common, r=16, lora_alpha=32)
    if kind == "tinylora":
        return TinyLoraConfig(**common)
    if kind == "ia3":
        return IA3Config(**common, feedforward_modules=[name for name in TARGETS[where] if name == "down_proj"])
    raise SystemExit(f"There is no method {method!r}.")


def questions(cell: Cell, task: Task) -> list[dict[str, Any]]:
    """The rows that `ReinforceTrainer` asks, each once, in its order: as many as the cell's steps take."""
    rows = task.rows("train", "choice", seed=cell.seed)
    sampler = RepeatSampler(range(len(rows)), 1, batch_size=cell.questions, shuffle=True, seed=cell.seed)
    epochs = chain.from_iterable(repeat(sampler))  # each pass is another epoch
    return [rows[i] for i in islice(epochs, cell.steps * cell.questions)]


def validation(task: Task) -> list[dict[str, Any]]:
    return task.rows("validation", "choice", limit=160)


def reinforce(cell: Cell, model: Any, tokenizer: Any, task: Task, common: dict[str, Any]) -> Trainer:
    """REINFORCE with the mean of the question's other answers as baseline."""
    return ReinforceTrainer(
        model,
        task.reward,
        ReinforceConfig(
            **common,
            per_device_train_batch_size=cell.questions * cell.samples,
            num_generations=cell.samples,
            temperature=cell.temperature,
            beta=cell.beta,
            advantage_estimator=cell.baseline,
            max_grad_norm=1.0,
        ),
        Dataset.from_list(task.rows("train", "choice", seed=cell.seed)),
        eval_dataset=Dataset.from_list(validation(task)),
        processing_class=tokenizer,
        peft_config=adapter(cell.method),
    )


class Imitation(SFTTrainer):
    """Next-token loss, validated as the others are."""

    rows: list[dict[str, Any]]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        accuracy = evaluate(
            self.model, self.processing_class, self.rows, self.args.per_device_eval_batch_size
        ).accuracy
        metrics = {"eval_reward": 2 * accuracy - 1}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def sft(cell: Cell, model: Any, tokenizer: Any, task: Task, common: dict[str, Any]) -> Trainer:
    """Next-token loss on the tokens of the right answers, mean over the batch."""

    def solved(row: dict[str, Any]) -> dict[str, Any]:
        right = row["choices"][row["label"]]
        return {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": right}]}

    rows = validation(task)
    trainer = Imitation(
        model,
        SFTConfig(
            **common,
            per_device_train_batch_size=cell.questions,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            metric_for_best_model="eval_reward",
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([solved(row) for row in questions(cell, task)]),
        eval_dataset=Dataset.from_list([solved(row) for row in rows]),
        processing_class=tokenizer,
        peft_config=adapter(cell.method),
    )
    trainer.rows = rows
    return trainer


def evolution(cell: Cell, model: Any, tokenizer: Any, task: Task, common: dict[str, Any]) -> Trainer:
    """Evolution strategies on z: every member of the population answers every question of a step."""
    return EvolutionTrainer(
        model,
        task.reward,
        EvolutionConfig(
            **common,
            per_device_train_batch_size=cell.questions,
            population=cell.samples,
            rows_per_forward=64,
            train_sampling_strategy="sequential",
        ),
        questions(cell, task),
        validation(task),
        processing_class=tokenizer,
        peft_config=adapter(cell.method),
    )


LEARNERS: dict[str, Callable[..., Trainer]] = {"reinforce": reinforce, "sft": sft, "evolution": evolution}


def train(cell: Cell, model: Any, tokenizer: Any, task: Task, folder: str) -> Trainer:
    """Make the trainer of a cell, whose log counts the tokens that training read."""
    common = {
        "output_dir": folder,
        "max_steps": cell.steps,
        "per_device_eval_batch_size": 16,
        "learning_rate": cell.lr,
        "warmup_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": cell.eval_steps,
        "save_strategy": "steps",
        "save_steps": cell.eval_steps,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "bf16": False,
        "seed": cell.seed,
    }
    trainer = LEARNERS[cell.learner](cell, model, tokenizer, task, common)
    trainer.add_callback(TokensRead(trainer.model))
    return trainer


class TokensRead(TrainerCallback):
    """
    Counts the token positions that the model reads while it trains, padding included, and logs their sum as `tokens`.

    One count for all learners: prompts and choices of rollouts, of members and of the forward that is differentiated.
    Backward passes are not counted, validation neither.
    """

    def __init__(self, model: Any) -> None:
        self.total = self.step = 0
        model.get_input_embeddings().register_forward_hook(self._read)

    def _read(self, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self.step += inputs[0].numel()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.total = max((entry.get("tokens", 0) for entry in state.log_history), default=0)  # of a resumed run
        self.step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.total, self.step = self.total + self.step, 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = 0

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.log_history[-1]["tokens"] = self.total
