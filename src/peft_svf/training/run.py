# SPDX-License-Identifier: Apache-2.0
"""
What all trainers share: whole checkpoints, checks of rows and rewards, a report of steps that teach nothing.

[`Run`] is a mixin for a `transformers.Trainer`. Nothing here knows TRL or what a task is.
"""

import asyncio
import functools
import inspect
import logging
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import is_torch_bf16_gpu_available

from ..evaluation import BaseText, choice_logps, complete, context_of
from ..evaluation.reading import evaluating, shared_prompts
from ..experts.key import KEY_NAME, make_key
from ..files import read_json, write
from ..rows import Row, has_image, prompt_ids, prompt_of, tokenizer_of
from ..tasks import everyday_requests
from ..tuner.config import SVFConfig
from ..tuner.fingerprint import Recorded
from ..tuner.layer import svf_layers
from ..tuner.targets import block_of

logger = logging.getLogger(__name__)

CHECKED_ROWS = 20_000  # rows of the data that are read before training
KEY_ROWS = 256  # rows of the data from which a routing key is drawn
HUGE = 1e15  # the square of a reward, and a sum of many, has to fit float32
SHOWN = {
    "eval_reward": "validation reward",
    "reward": "reward",
    "reward_best": "best member",
    "kl": "KL",
    "retention": "KL of everyday answers",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "frac_reward_zero_std": "dead groups",
    "z/mean_distance_from_1": "mean |z-1|",
    "eval_text_loss": "text lost",
}


@dataclass
class RunConfig:
    """
    Settings of all trainers on when a run stops and which checkpoint is the best.

    Args:
        early_stopping_patience (`int`, *optional*):
            Stop after so many evaluations without a better one.
        keep_text (`float`, *optional*):
            At each evaluation, stop if the base's own answers to everyday requests are less likely per token than
            before by more than this share, such as 0.02. The best checkpoint is then an earlier one; if there is none,
            `z - 1` is scaled down until it keeps the promise.
        stop_after_dead_steps (`int`, *optional*):
            Stop after so many steps in a row that taught nothing: equal rewards, or no gradient. The first such step
            is reported with the way out.
    """

    measured: ClassVar[str] = "reward|reward_std|rewards/.+"  # what an evaluation knows; another ends the run at it
    lr_scheduler_type: str = "cosine"
    metric_for_best_model: str | None = "eval_reward"
    restore_callback_states_from_checkpoint: bool = True  # early stopping and the filter go on counting
    early_stopping_patience: int | None = None
    keep_text: float | None = None
    stop_after_dead_steps: int | None = None

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        """Yield the settings that would silently do something else: field, whether it is right, what is expected."""
        ones = ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"]
        ones += ["num_generations", "rows_per_forward", "max_completion_length"]
        ones += ["early_stopping_patience", "stop_after_dead_steps"]
        settings = vars(self)
        for name, least in {**dict.fromkeys(ones, 1), "beta": 0, "reward_clip": 0, "keep_text": 0}.items():
            value = settings.get(name)
            yield name, value is None or value >= least, f"{least} or more"
        yield "max_steps", settings["max_steps"] != 0, "a number of steps, or -1 for all of num_train_epochs"
        best = str(self.metric_for_best_model).removeprefix("eval_")
        expected = "'eval_reward' or another reward, which an evaluation measures"
        yield "metric_for_best_model", re.fullmatch(self.measured, best) is not None, expected

    def check(self) -> None:
        """
        Raise a `ValueError` for the first rule that a setting breaks, before TRL and transformers rewrite any.

        TRL's default of `bf16` asks a GPU for it, whatever the machine has: here the device decides.
        """
        for name, right, expected in self.rules():
            if not right:
                raise ValueError(f"`{name}` must be {expected}; got {getattr(self, name)!r}.")
        settings: Any = self
        if settings.bf16 is None:
            settings.bf16 = not settings.fp16 and not settings.use_cpu and is_torch_bf16_gpu_available()


def last_checkpoint(folder: str | PathLike[str]) -> Path:
    """Find the newest whole checkpoint of a run; a `ValueError` if there is none."""
    folders = [path for path in Path(folder).glob("checkpoint-*") if path.name[len("checkpoint-") :].isdecimal()]
    for checkpoint in sorted(folders, key=lambda path: int(path.name[len("checkpoint-") :]), reverse=True):
        with suppress(ValueError):
            state_of(checkpoint)
            return checkpoint
    raise ValueError(
        f"There is no whole checkpoint in {str(folder)!r} to resume from, of {len(folders)} folders named "
        "checkpoint-N: train without resuming, or name another output_dir."
    )


def state_of(checkpoint: str | PathLike[str]) -> TrainerState:
    """Read `trainer_state.json`, which transformers writes last; a `ValueError` if the checkpoint isn't whole."""
    try:
        read_json(path := Path(checkpoint) / TRAINER_STATE_NAME)  # neither nested too deep nor a pipe
        state = TrainerState.load_from_json(str(path))
        counters = [state.global_step]
        for saved in state.stateful_callbacks.values():
            for part in saved if isinstance(saved, list) else [saved]:
                counters += [value for name, value in part["attributes"].items() if name.endswith("counter")]
                counters += [count for pair in part["attributes"].get("record", {}).values() for count in pair]
        if not all(type(count) is int and count >= 0 for count in counters) or not math.isfinite(state.epoch or 0):
            raise ValueError("its counters are damaged")
        return state
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{str(checkpoint)!r} isn't a whole checkpoint ({error}). Name an earlier one, or --resume (in Python "
            "resume_from_checkpoint=True) alone for the newest whole one."
        ) from error


def ended(checkpoint: str | PathLike[str], args: TrainingArguments) -> str | None:
    """Describe how far a run got if no step is left after its checkpoint; else return `None`."""
    state = state_of(checkpoint)
    step, epoch = state.global_step, state.epoch or 0
    if args.max_steps > step or (args.max_steps <= 0 and args.num_train_epochs > epoch):
        return None
    return f"This run is finished ({step} steps, {epoch:g} epochs): raise max_steps or num_train_epochs to go on."


def z_statistics(model: nn.Module) -> dict[str, float]:
    """
    Measure how far the trained multipliers are from 1, dimensionless. Under FSDP every process has to call it.

    Returns:
        `dict` with `z/mean_distance_from_1` and `z/max_distance_from_1` over all entries, and the mean per block of
        the model, such as `z/model.layers.3/mean_distance_from_1`; empty if no z-vector is trained.
    """
    blocks: dict[str, list[Tensor]] = defaultdict(list)
    for name, layer in svf_layers(model).items():
        for offset in layer.svf_offset.values():
            weight: Any = offset.weight
            if weight.requires_grad:
                whole = weight.full_tensor() if isinstance(weight, DTensor) else weight  # FSDP2 shards it
                blocks[block_of(name)].append(whole.detach().abs())
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

    Reward models, and names of such, are returned as they are. Async functions stay async.
    """
    if not callable(reward) or isinstance(reward, nn.Module):
        return reward
    name = getattr(reward, "__name__", type(reward).__name__)

    def check(rewards: Any, completions: Sequence[Any]) -> list[float | None]:
        rewards = rewards.tolist() if isinstance(rewards, Tensor | np.ndarray) else rewards
        numbers = list(map(_number, rewards)) if isinstance(rewards, list | tuple) else []
        if len(numbers) != len(completions):
            wrong = f"{rewards!r:.80} for {len(completions)} completions"
        else:
            bad = (i for i, number in enumerate(numbers) if abs(number) > HUGE)
            wrong = next((f"{rewards[i]!r} for {completions[i]!r}" for i in bad), "")
        if wrong:
            raise ValueError(
                f"The reward function {name!r} returned {wrong}: it should return a list with a number below "
                f"{HUGE:g}, or None, for each completion."
            )
        return [None if math.isnan(number) else number for number in numbers]

    async def later(**columns: Any) -> list[float | None]:
        return check(await reward(**columns), columns["completions"])

    def now(**columns: Any) -> list[float | None]:
        return check(reward(**columns), columns["completions"])

    is_async = inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)
    checked: Any = functools.update_wrapper(later if is_async else now, reward)
    checked.__name__ = name
    return checked


def _number(reward: Any) -> float:
    """Convert a reward: NaN if it is missing, infinity if it isn't a number."""
    try:
        return math.nan if reward is None else float(reward)
    except (TypeError, ValueError):
        return math.inf


def columns_of(dataset: Any) -> Sequence[str]:
    """List the columns of a dataset; a stream may reveal them only in its first row."""
    if dataset is None:
        return ()
    return getattr(dataset, "column_names", None) or list(next(iter(dataset), {}))


def check_prompts(model: nn.Module, reader: Any, data: Any) -> None:
    """
    Raise a `ValueError` for a row that would end a run in its course: its prompt is empty or leaves no room to answer.

    Streams, rows with images and rows beyond [`CHECKED_ROWS`] aren't read.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    vocabulary, tokens = base.get_input_embeddings().num_embeddings, len(tokenizer_of(reader))
    if tokens > vocabulary:
        raise ValueError(
            f"The tokenizer has {tokens} tokens, but the model's vocabulary is {vocabulary}: load the model's own "
            f"tokenizer, or call model.resize_token_embeddings({tokens}) before training."
        )
    limit = context_of(base) or math.inf
    for number in range(min(len(data), CHECKED_ROWS) if isinstance(data, Sized) else 0):
        row = data[number]
        if "prompt" not in row or has_image(row):
            return
        (ids,) = prompt_ids(reader, [row["prompt"]])
        if not 0 < len(ids) < limit:
            raise ValueError(
                f"Row {number} of the data has a prompt of {len(ids)} tokens, but the model's context is {limit}, and "
                "a prompt and its answer have one at least: change or drop the row."
            )


class Line(TrainerCallback):
    """Writes the log as a line that a person can read; trackers get everything."""

    def __init__(self, shown: Mapping[str, str]) -> None:
        super().__init__()
        self.shown = shown

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        parts = [f"{label} {logs[key]:.4g}" for key, label in self.shown.items() if logs and logs.get(key) is not None]
        if parts and state.is_world_process_zero:
            tqdm.write(f"step {state.global_step:>4}/{state.max_steps}  " + "  ".join(parts))
            sys.stdout.flush()  # a pipe shows each line at once


class LineOnBar(Line, ProgressCallback):
    """Keeps transformers' bar below the lines."""


class DeadSteps(TrainerCallback):
    """Reports the first step that teaches nothing, and stops after too many of them in a row."""

    def __init__(self, trainer: Any, limit: int | None) -> None:
        self.trainer, self.limit, self.count, self.reported = trainer, limit, 0, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = (p.grad for p in self.trainer.model.parameters() if p.requires_grad and p.grad is not None)
        if any(bool(gradient.any()) for gradient in gradients):
            self.count = 0
            return
        reason = self.trainer.dead_reason or (
            "No gradient reaches the trained parameters: their layers don't run in the model's forward, or the reward "
            "does not depend on the completions. Choose other target_modules or another reward."
        )
        self.count += 1
        if not self.reported:
            self.reported = True
            logger.warning(f"Step {state.global_step + 1} teaches nothing. {reason}")
        if self.limit is not None and self.count >= self.limit:
            logger.warning(f"Training stops: {self.count} steps in a row taught nothing. {reason}")
            control.should_training_stop = True


class KeptText(TrainerCallback):
    """
    Keeps a run's promise: the base's own answers to everyday requests get less likely by at most `keep_text`.

    An evaluation that finds more ends the run and isn't the best. What the run ends with is measured too, and if no
    checkpoint kept the promise, its offsets are scaled by the largest tenth that does.
    """

    def __init__(self, trainer: Any, limit: float) -> None:
        self.trainer, self.limit = trainer, limit
        self.text: BaseText | None = None

    def loss(self) -> float:
        """Measure the loss of likelihood, after the base has answered."""
        model, reader = self.trainer.model, self.trainer.processing_class
        if self.text is None:
            with model.disable_adapter():
                self.text = BaseText.of(model, reader, everyday_requests("validation", 32))
        return self.text.loss(model, reader)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        loss = self.loss()
        self.trainer.log({"eval_text_loss": loss})
        if loss > self.limit:
            worst = -math.inf if args.greater_is_better else math.inf
            metrics[f"eval_{args.metric_for_best_model.removeprefix('eval_')}"] = worst  # never the best checkpoint
            control.should_training_stop = True
            logger.warning(
                f"Training stops: the base's own answers to everyday requests are {loss:.1%} less likely, above "
                f"keep_text={self.limit:.1%}. load_best_model_at_end takes an earlier checkpoint; retention > 0 or a "
                "lower learning_rate keep more."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        offsets = [
            p for name, p in self.trainer.model.named_parameters() if p.requires_grad and ".svf_offset." in name
        ]
        trained, tenths = [offset.detach().clone() for offset in offsets], 10
        while tenths and self.loss() > self.limit:
            tenths -= 1
            for offset, whole in zip(offsets, trained, strict=True):
                offset.data.copy_(whole * (tenths / 10))
        self.trainer.strength = tenths / 10
        if tenths < 10:
            logger.warning(
                f"No checkpoint keeps the base's text as keep_text={self.limit:.1%} asks: z - 1 is scaled by "
                f"{self.trainer.strength}, which does."
            )


class Run(Trainer):
    """Mixin for a `transformers.Trainer`: whole checkpoints, early stopping, evaluation that changes nothing."""

    epochs_done = 0  # before the checkpoint that is resumed from
    dead_reason: str | None = None  # why the latest rollout teaches nothing
    names_sets = True  # metrics have the names of several evaluation sets
    routing = True  # an expert is saved with a routing key
    objective = "policy gradient (REINFORCE)"  # what a card calls it
    strength = 1.0  # by which keep_text has scaled what was trained
    shown: Mapping[str, str] = SHOWN  # metrics of a line of the log, with their labels

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Train as `transformers.Trainer` does.

        `resume_from_checkpoint=True` takes the newest whole checkpoint in `output_dir`. If no step is left after a
        checkpoint, its adapter is loaded and nothing is trained.

        Raises:
            `ValueError`: if no checkpoint to resume from is whole, or it belongs to another base model.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(self.args.output_dir))
        if resume_from_checkpoint:
            checkpoint = Path(str(resume_from_checkpoint))
            over = ended(checkpoint, self.args)
            self._check_base(checkpoint)
            if over:
                logger.warning(f"{over} The adapter that it ended with is loaded.")
                return self._load_finished(checkpoint)
            self.epochs_done = int(state_of(checkpoint).epoch or 0)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_base(self, checkpoint: Path) -> None:
        """Compare the fingerprint of a checkpoint with this base, as PEFT doesn't when it resumes."""
        name = self.model.active_adapters[0] if isinstance(self.model, PeftModel) else ""
        config = self.model.peft_config[name] if name else None
        if isinstance(config, SVFConfig) and not config.fingerprint and (checkpoint / CONFIG_NAME).is_file():
            saved = SVFConfig.from_pretrained(str(checkpoint))
            self.model.base_model.check_fingerprint(name, saved)
            config.fingerprint = Recorded(saved.fingerprint)

    def _load_finished(self, checkpoint: Path) -> TrainOutput:
        """Load state and adapter of a run without a step left, after which transformers 5.23.0 would make one more."""
        self.state = state_of(checkpoint)
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end and (best := self.state.best_model_checkpoint):
            self.state.best_model_checkpoint = str(checkpoint.parent / Path(best).name)  # the folder may have moved
            self._load_best_model()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, KeptText):
                callback.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, 0.0, {})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter as transformers does, and with a final one a routing key."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self.save_key(output_dir or self.args.output_dir)

    def save_key(self, folder: str | PathLike[str]) -> None:
        """Write a routing key of some training prompts, if `routing` is on and one process has the whole model."""
        if not self.routing or not self.args.should_save:
            return
        reason = "the model is sharded"
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            try:
                prompts = [row["prompt"] for row in islice(self.train_dataset, KEY_ROWS)]
                key = make_key(self.model, self.processing_class, prompts, seed=self.args.seed)
                return write(Path(folder) / KEY_NAME, key.to_bytes())
            except (ValueError, KeyError) as error:
                reason = str(error)
        logger.warning(f"The expert gets no routing key ({reason}); peft-svf key makes one later.")

    def check_adapter(self, model: Any, args: Any, peft_config: Any) -> None:
        """Refuse a model that would be trained whole or not at all, or whose best checkpoint would stay unread."""
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

    def ready(self) -> None:
        """Make trained numbers float32 and add the callbacks: readable lines, dead steps, early stopping."""
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()  # TRL makes them bfloat16 on quantised bases
        if isinstance(self.eval_dataset, Sized) and not len(self.eval_dataset):
            raise ValueError("`eval_dataset` has no rows, of which no mean can be taken: leave it out, or fill it.")
        sets, best = self.eval_dataset, str(self.args.metric_for_best_model).removeprefix("eval_")
        if self.names_sets and isinstance(sets, Mapping) and not best.startswith(tuple(f"{name}_" for name in sets)):
            raise ValueError(
                f"With several evaluation sets `metric_for_best_model` must name one of them, such as "
                f"'eval_{next(iter(sets))}_reward'; got {self.args.metric_for_best_model!r}."
            )
        for theirs, line in ((ProgressCallback, LineOnBar), (PrinterCallback, Line)):
            if self.pop_callback(theirs) is not None:
                self.add_callback(line(self.shown))
        self.add_callback(DeadSteps(self, self.args.stop_after_dead_steps))
        if self.args.keep_text is not None:
            self.add_callback(KeptText(self, self.args.keep_text))
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))

    @contextmanager
    def unchanged_randomness(self) -> Iterator[None]:
        """Put torch's random generators back at the end: training goes on as if nothing had been drawn inside."""
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield


class Graded(Run):
    """A [`Run`] that grades the likeliest answers by reward functions, several of them by their weighted sum."""

    reward_funcs: Sequence[Any] = ()
    reward_weights: Sequence[float] = ()

    def grade_by(self, reward_funcs: Any, weights: Sequence[float] | None) -> None:
        """Take one reward function or several, as `ReinforceTrainer` does, without its reward models."""
        functions = [reward_funcs] if callable(reward_funcs) else list(reward_funcs or ())
        self.reward_funcs = [checked_reward(function) for function in functions]
        self.reward_weights = weights or [1.0] * len(functions)

    def answers(self, rows: Sequence[Row], members: int = 1) -> list[str]:
        """Write a greedy answer to each row; `members` copies of the rows may have an adapter each."""
        prompts, length = [prompt_of(row) for row in rows], self.args.max_completion_length
        with shared_prompts(self.model, members):
            return complete(self.model, self.processing_class, prompts, max_new_tokens=length)

    def rewards(self, rows: Sequence[Row], texts: Sequence[str]) -> Tensor:
        """Compute the weighted reward `(rows,)` of a text for each row; `None` counts as 0."""
        chat = not isinstance(rows[0]["prompt"], str)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else list(texts)
        keys = dict.fromkeys(key for row in rows for key in row if key not in ("prompt", "completion"))
        columns = {key: [row.get(key) for row in rows] for key in keys}
        prompts = [row["prompt"] for row in rows]
        total = torch.zeros(len(rows), device=self.accelerator.device)
        for reward, weight in zip(self.reward_funcs, self.reward_weights, strict=True):
            rewards = reward(prompts=prompts, completions=completions, **columns)
            if inspect.iscoroutine(rewards):
                rewards = asyncio.run(rewards)
            total += weight * torch.tensor([0.0 if r is None else r for r in rewards], device=total.device)
        return total

    def greedy_reward(self, dataset: Any) -> float:
        """Average the rewards of the likeliest choices or greedy answers of all rows over all processes."""
        size, processes = self.args.per_device_eval_batch_size, self.accelerator.num_processes
        share = [dataset[i] for i in range(self.accelerator.process_index, len(dataset), processes)]
        total = torch.tensor([0.0, len(share)], device=self.accelerator.device)
        with self.unchanged_randomness(), evaluating(self.model), self.compute_loss_context_manager():
            for start in range(0, len(share), size):
                rows = share[start : start + size]
                if rows[0].get("choices") is not None:
                    best = choice_logps(self.model, self.processing_class, rows).argmax(-1).tolist()
                    texts = [row["choices"][k] for row, k in zip(rows, best, strict=True)]
                else:
                    texts = self.answers(rows)
                total[0] += self.rewards(rows, texts).sum()
        total = self.accelerator.reduce(total, reduction="sum")
        return (total[0] / total[1]).item()
