# SPDX-License-Identifier: Apache-2.0
"""
What training runs need whatever they learn from: whole checkpoints, usable rows and rewards, how far z has moved.

Goes in: a `transformers.Trainer` by inheritance. Nothing here knows TRL or what a task is.
"""

import functools
import inspect
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from ..evaluation import context_of
from ..files import read_json
from ..rows import has_image, prompt_ids, tokenizer_of
from ..tuner.config import SVFConfig
from ..tuner.fingerprint import Recorded
from ..tuner.layer import svf_layers
from ..tuner.targets import block_of

logger = logging.getLogger(__name__)

CHECKED_ROWS = 20_000  # rows of the data that are read before training
HUGE = 1e15  # the square of a reward, and a sum of many, has to fit float32
# What a line on the screen shows; trackers get everything.
SHOWN = {
    "eval_reward": "eval_reward",
    "reward": "reward",
    "reward_best": "best",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "frac_reward_zero_std": "dead_groups",
    "z/mean_distance_from_1": "|z-1|",
}


def last_checkpoint(folder: str | PathLike[str]) -> Path:
    """
    Find the newest whole checkpoint of a run; one that was being written when the process was killed is passed over.

    Raises:
        `ValueError`: if the folder has none.
    """
    paths = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(paths, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if _state(path) is not None:
            return path
    raise ValueError(
        f"There is no whole checkpoint in {str(folder)!r} to resume from, of {len(paths)} folders named checkpoint-N: "
        "train without resuming, or name another output_dir."
    )


def ended(checkpoint: str | PathLike[str], args: TrainingArguments) -> str | None:
    """
    Tell whether no step is left to train after a checkpoint: how far the run got, and how to go on; else `None`.

    Raises:
        `ValueError`: if it isn't a whole checkpoint.
    """
    state = _state(Path(checkpoint))
    if state is None:
        raise ValueError(
            f"{str(checkpoint)!r} isn't a whole checkpoint: its trainer_state.json is missing, cut off or damaged. "
            "Name an earlier one, or --resume (in Python resume_from_checkpoint=True) alone for the newest whole one."
        )
    step, epoch = state["global_step"], state["epoch"] or 0
    if 0 < args.max_steps <= step:
        return f"This run is finished ({step} of {args.max_steps} steps): raise max_steps to go on."
    if args.max_steps <= 0 and args.num_train_epochs <= epoch:
        return f"This run is finished ({epoch:g} of {args.num_train_epochs:g} epochs): raise num_train_epochs."
    return None


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """Read `trainer_state.json`, which transformers writes last; `None` if it is missing, cut off or damaged."""
    try:
        state = read_json(checkpoint / TRAINER_STATE_NAME)
        step, epoch = state["global_step"], state.setdefault("epoch", None)
        whole = type(step) is int and step >= 0 and (epoch is None or math.isfinite(epoch))
        return state if whole and isinstance(state.get("stateful_callbacks", {}), dict) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def z_statistics(model: nn.Module) -> dict[str, float]:
    """
    Measure how far the trained multipliers are from 1, dimensionless. Under FSDP every process has to call it.

    Returns:
        `dict` with `z/mean_distance_from_1` and `z/max_distance_from_1` over all entries, and the mean per block of
        the model as `z/<block>/mean_distance_from_1`, such as `z/model.layers.3/mean_distance_from_1`; empty if no
        z-vector is trained.
    """
    blocks: dict[str, list[Tensor]] = defaultdict(list)
    for name, layer in svf_layers(model).items():
        for offset in layer.svf_offset.values():
            if offset.weight.requires_grad:
                trained = offset.weight.detach()
                whole = trained.full_tensor() if isinstance(trained, DTensor) else trained  # sharded by FSDP2
                blocks[block_of(name)].append(whole.abs().flatten())
    if not blocks:
        return {}
    joined = [torch.cat(vectors) for vectors in blocks.values()]
    everything = torch.cat(joined)
    names = ["z/mean_distance_from_1", "z/max_distance_from_1", *(f"z/{name}/mean_distance_from_1" for name in blocks)]
    values = torch.stack([everything.mean(), everything.max(), *(vector.mean() for vector in joined)])
    return dict(zip(names, values.tolist(), strict=True))  # one transfer from the device for all


def checked_reward(reward: Any) -> Any:
    """
    Wrap a reward function so that it returns a finite number or `None` for each completion, or fails by its name.

    Reward models, and names of such, are left as they are. Async functions stay async.
    """
    if not callable(reward) or isinstance(reward, nn.Module):
        return reward
    name = getattr(reward, "__name__", type(reward).__name__)

    def check(rewards: Any, completions: Sequence[Any]) -> list[float | None]:
        if isinstance(rewards, Tensor | np.ndarray):
            rewards = rewards.tolist()
        if not isinstance(rewards, list | tuple) or len(rewards) != len(completions):
            what = f"{len(rewards)} rewards" if isinstance(rewards, list | tuple) else repr(rewards)
            raise ValueError(
                f"The reward function {name!r} returned {what} for {len(completions)} completions: it should return a "
                "list with a number, or None, for each."
            )
        numbers: list[float | None] = []
        for value, completion in zip(rewards, completions, strict=True):
            try:
                number = math.nan if value is None else float(value)
            except (TypeError, ValueError):
                raise ValueError(
                    f"The reward function {name!r} returned {value!r} for {completion!r}, which isn't a number."
                ) from None
            if abs(number) > HUGE:
                raise ValueError(
                    f"The reward function {name!r} returned {number:g} for {completion!r}: rewards must be finite and "
                    f"below {HUGE:g}, or their spread overflows. Bound what the function returns."
                )
            numbers.append(None if math.isnan(number) else number)
        return numbers

    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__):

        async def awaited(*args: Any, **kwargs: Any) -> list[float | None]:
            return check(await reward(*args, **kwargs), _completions(args, kwargs))

        return _named(awaited, reward, name)

    def called(*args: Any, **kwargs: Any) -> list[float | None]:
        return check(reward(*args, **kwargs), _completions(args, kwargs))

    return _named(called, reward, name)


def _completions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    return kwargs["completions"] if "completions" in kwargs else args[0]


def _named(wrapper: Any, reward: Any, name: str) -> Any:
    functools.update_wrapper(wrapper, reward)
    wrapper.__name__ = name
    return wrapper


def check_prompts(model: nn.Module, reader: Any, data: Any) -> None:
    """
    Refuse rows that would end a run in its course: empty prompts, and prompts that leave no room for an answer.

    Streams, rows with images and rows beyond [`CHECKED_ROWS`] aren't read.

    Raises:
        `ValueError`: for the first such row, by its number; for a tokenizer with more tokens than the model.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    words, known = base.get_input_embeddings().num_embeddings, len(tokenizer_of(reader))
    if known > words:
        raise ValueError(
            f"The tokenizer has {known} tokens, but the model's vocabulary is {words}: load the model's own "
            f"tokenizer, or call model.resize_token_embeddings({known}) before training."
        )
    limit = context_of(base) or math.inf
    for start in range(0, min(len(data), CHECKED_ROWS) if isinstance(data, Sized) else 0, 1000):
        rows = [data[i] for i in range(start, min(start + 1000, len(data)))]
        if "prompt" not in rows[0] or has_image(rows[0]):
            return
        for number, ids in enumerate(prompt_ids(reader, [row["prompt"] for row in rows]), start):
            if not ids:
                raise ValueError(f"Row {number} of the data has an empty prompt: there is nothing to answer.")
            if len(ids) >= limit:
                raise ValueError(
                    f"Row {number} of the data has a prompt of {len(ids)} tokens, but the model's context is {limit}: "
                    "shorten or drop it."
                )


class Line:
    """In front of transformers' callbacks that write the log to the screen: a line that a person can read."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = {label: logs[key] for key, label in SHOWN.items() if logs and logs.get(key) is not None}
        if logs:
            line = {"step": f"{state.global_step}/{state.max_steps}"}
            line |= {label: f"{value:.4g}" for label, value in logs.items()}
            super().on_log(args, state, control, logs=line, **kwargs)  # type: ignore[misc]


class LineOnBar(Line, ProgressCallback):
    """A progress bar with readable lines above it."""


class PrintedLine(Line, PrinterCallback):
    """Readable lines without a bar."""


class DeadSteps(TrainerCallback):
    """Reports the first step that teaches nothing, and stops after too many of them in a row."""

    def __init__(self, trainer: Any, limit: int | None) -> None:
        self.trainer, self.limit, self.count, self.told = trainer, limit, 0, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reason = self.trainer.dead_reason
        if reason is None:
            gradients = [p.grad for p in self.trainer.model.parameters() if p.requires_grad and p.grad is not None]
            if not any(bool(gradient.any()) for gradient in gradients):
                reason = (
                    "No gradient reaches the trained parameters: their layers don't run in the model's forward, or "
                    "the reward does not depend on the completions. Choose other target_modules or another reward."
                )
        self.count = self.count + 1 if reason else 0
        if reason and not self.told:
            self.told = True
            logger.warning(f"Step {state.global_step + 1} teaches nothing. {reason}")
        if self.limit is not None and self.count >= self.limit:
            logger.warning(f"Training stops: {self.count} steps in a row taught nothing. {reason}")
            control.should_training_stop = True


class Run:
    """In front of a `transformers.Trainer`: whole checkpoints, early stopping, evaluation that changes nothing."""

    epochs_done = 0  # before the checkpoint that is resumed from
    dead_reason: str | None = None  # why the rollout at hand teaches nothing

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train as `transformers.Trainer` does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint's folder, or `True` for the newest whole one in `output_dir`. If no step is left after
                it, its adapter is loaded and nothing is trained.
            args, kwargs:
                Everything else that `Trainer.train` takes.

        Raises:
            `ValueError`: if there is no whole checkpoint to resume from, or it belongs to another base model.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(self.args.output_dir))  # type: ignore[attr-defined]
        if resume_from_checkpoint:
            checkpoint = Path(str(resume_from_checkpoint))
            over = ended(checkpoint, self.args)  # type: ignore[attr-defined]
            self._check_base(checkpoint)
            if over:
                logger.warning(f"{over} The adapter that it ended with is loaded.")
                return self._load_finished(checkpoint)
            self.epochs_done = int((_state(checkpoint) or {}).get("epoch") or 0)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _check_base(self, checkpoint: Path) -> None:
        """Compare the fingerprint of a checkpoint with this base: PEFT reads an adapter that is there without it."""
        model: Any = self.model  # type: ignore[attr-defined]
        name = model.active_adapters[0] if isinstance(model, PeftModel) else ""
        config = model.peft_config[name] if name else None
        if isinstance(config, SVFConfig) and not config.fingerprint and (checkpoint / CONFIG_NAME).is_file():
            saved = SVFConfig.from_pretrained(str(checkpoint))
            model.base_model.check_fingerprint(name, saved)
            config.fingerprint = Recorded(saved.fingerprint)

    def _load_finished(self, checkpoint: Path) -> TrainOutput:
        """Load state and adapter of a run that has no steps left (transformers 5.23.0)."""
        trainer: Any = self
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        trainer._load_from_checkpoint(str(checkpoint))
        if trainer.args.load_best_model_at_end and (best := trainer.state.best_model_checkpoint):
            trainer.state.best_model_checkpoint = str(checkpoint.parent / Path(best).name)  # the folder may have moved
            trainer._load_best_model()
        return TrainOutput(trainer.state.global_step, 0.0, {})

    def check_adapter(self, model: Any, args: Any, peft_config: Any) -> None:
        """Refuse a model of which nothing or everything would be trained, and a best checkpoint that stays unread."""
        if peft_config is not None:
            return
        if not isinstance(model, PeftModel):
            raise ValueError("A plain model would be trained whole: pass peft_config=SVFConfig(), or a PeftModel.")
        name = model.active_adapters[0]
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"Nothing of the model is trainable: adapter {name!r} was loaded for inference. Load it by "
                "PeftModel.from_pretrained(..., is_trainable=True)."
            )
        if args.load_best_model_at_end and name != "default":
            raise ValueError(
                f"load_best_model_at_end finds the checkpoint of an adapter called 'default' alone, and this one is "
                f"{name!r}: load it by PeftModel.from_pretrained(...) without adapter_name, or turn the option off."
            )

    def watch(self) -> None:
        """Add what both trainers have: readable lines, a word on dead steps, early stopping."""
        trainer: Any = self
        for theirs, line in ((ProgressCallback, LineOnBar), (PrinterCallback, PrintedLine)):
            if trainer.pop_callback(theirs) is not None:
                trainer.add_callback(line())
        trainer.add_callback(DeadSteps(self, trainer.args.stop_after_dead_steps))
        if trainer.args.early_stopping_patience is not None:
            trainer.add_callback(EarlyStoppingCallback(trainer.args.early_stopping_patience))

    @contextmanager
    def unchanged_randomness(self) -> Iterator[None]:
        """Put torch's random generators back at the end: training goes on as if nothing had been drawn inside."""
        device = self.accelerator.device  # type: ignore[attr-defined]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield


def check_run(args: Any) -> None:
    """Raise a `ValueError` for settings of a run, of either trainer, that mean nothing."""
    batches = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    counts = ("num_generations", "max_completion_length", "early_stopping_patience", "stop_after_dead_steps")
    for name in (*batches, *counts):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be 1 or more; got {value}.")
    if args.max_steps == 0 or (args.max_steps < 0 and not args.num_train_epochs > 0):
        raise ValueError(
            f"max_steps={args.max_steps} with num_train_epochs={args.num_train_epochs:g} trains nothing: raise one."
        )
    if args.early_stopping_patience is not None and args.eval_strategy == "no":
        raise ValueError("early_stopping_patience counts evaluations: set eval_strategy to 'steps' or 'epoch'.")
    if args.early_stopping_patience is not None and not (args.metric_for_best_model or args.load_best_model_at_end):
        raise ValueError("early_stopping_patience needs metric_for_best_model, such as its default eval_reward.")
