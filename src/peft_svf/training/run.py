# SPDX-License-Identifier: Apache-2.0
"""
What training runs need whatever they learn from: whole checkpoints, prompts worth a visit, how far z has moved.

Goes in: a `transformers.Trainer` by inheritance. Nothing here knows TRL or what a reward is.
"""

import json
import logging
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from ..tuner.config import SVFConfig
from ..tuner.fingerprint import Recorded
from ..tuner.layer import svf_layers
from ..tuner.targets import block_of

logger = logging.getLogger(__name__)


def last_checkpoint(folder: str | PathLike[str]) -> Path:
    """
    Find the newest whole checkpoint of a run: one that was being written when the process was killed is passed over.

    `trainer_state.json` is what transformers writes last; where it can be read, everything else is there.

    Raises:
        `ValueError`: if the folder has none.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if _state(path) is not None:
            return path
    raise ValueError(
        f"There is no whole checkpoint in {str(folder)!r} to resume from, of {len(found)} folders named checkpoint-N: "
        "train without resuming, or name another output_dir."
    )


def ended(checkpoint: str | PathLike[str], args: TrainingArguments) -> str | None:
    """
    Tell whether nothing is left to train after a checkpoint.

    Returns:
        `str` or `None`: why, and how to go on all the same; `None` where steps are left.

    Raises:
        `ValueError`: if it is no whole checkpoint.
    """
    state = _state(Path(checkpoint))
    if state is None:
        raise ValueError(
            f"{str(checkpoint)!r} is no whole checkpoint: its trainer_state.json is missing or cut off. Name an "
            "earlier one, or --resume (in Python resume_from_checkpoint=True) alone for the newest whole one."
        )
    step, epoch = state["global_step"], state.get("epoch") or 0
    if 0 < args.max_steps <= step:
        return f"This run is finished ({step} of {args.max_steps} steps): raise max_steps to go on."
    if args.max_steps <= 0 and args.num_train_epochs <= epoch:
        return f"This run is finished ({epoch:g} of {args.num_train_epochs:g} epochs): raise num_train_epochs."
    patience = getattr(args, "early_stopping_patience", None)
    if patience is not None and args.restore_callback_states_from_checkpoint:
        saved = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback") or []
        saved = saved if isinstance(saved, list) else [saved]  # a list where there are several of a class
        passed = min((each["attributes"]["early_stopping_patience_counter"] for each in saved), default=0)
        if passed >= patience:
            return (
                f"This run stopped early at step {step}, after {passed} evaluations without a better one: to go on, "
                "raise early_stopping_patience or leave it out."
            )
    return None


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """What `trainer_state.json` holds, or `None` where it is missing or cut off."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and "global_step" in state else None


def z_statistics(model: nn.Module) -> dict[str, float]:
    """
    Measure how far the trained multipliers are from 1, dimensionless. Under FSDP every process has to call it.

    Returns:
        `dict` with `z/mean_distance_from_1` and `z/max_distance_from_1` over all entries, and the mean per block of
        the model as `z/<block>/mean_distance_from_1`, such as `z/model.layers.3/mean_distance_from_1`; empty where no
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


class PromptFilter(TrainerCallback, ExportableState):
    """
    Passes over prompts whose completions all earned one reward: always or never solved, they teach nothing for now.

    A prompt rests for one visit after the first such group and twice as long, plus one, after each further one in a
    row, up to 31; then it is tried again, since what the model cannot do today it may do later. A callback, because
    transformers keeps the state of callbacks in its checkpoints.

    Attributes:
        record (`dict[str, list[int]]`):
            By number of the row: equal groups in a row, visits still to rest.
    """

    def __init__(self) -> None:
        self.record: dict[str, list[int]] = {}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"record": self.record}}

    def choose(self, asked: Sequence[int], total: int, seed: str) -> list[int]:
        """
        Replace resting prompts by others, as long as there are any.

        Args:
            asked (`Sequence[int]`): Numbers of the rows whose turn it is.
            total (`int`): Number of rows of the data.
            seed (`str`): Fixes the draw.

        Returns:
            `list[int]`, as long as `asked`.
        """
        awake = [i for i in range(total) if not self._rest(i)]
        random.Random(seed).shuffle(awake)
        free = (row for row in awake if row not in asked)
        chosen = [next(free, row) if self._rest(row) else row for row in asked]
        for row in set(asked):
            if self._rest(row):
                self.record[str(row)][1] -= 1
        return chosen

    def learn(self, row: int, equal: bool) -> None:
        """Note that the completions of a row all earned one reward, or that they did not."""
        streak = self.record.get(str(row), [0, 0])[0] + 1 if equal else 0
        self.record[str(row)] = [streak, min(2**streak, 32) - 1]

    def _rest(self, row: int) -> int:
        return self.record.get(str(row), [0, 0])[1]


class Run:
    """In front of a `transformers.Trainer`: whole checkpoints, early stopping, evaluation that changes nothing."""

    epochs_done = 0  # before the checkpoint that is resumed from

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train as `transformers.Trainer` does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint's folder, or `True` for the newest whole one in `output_dir`.
            args, kwargs:
                Everything else that `Trainer.train` takes.

        Where a checkpoint is the end of its run nothing is trained: the adapter that the run ended with is loaded.

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
                return self._load_ended(checkpoint)
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

    def _load_ended(self, checkpoint: Path) -> TrainOutput:
        """Take state and adapter as `train` left them when it wrote its last checkpoint (transformers 5.23.0)."""
        trainer: Any = self
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        trainer._load_from_checkpoint(str(checkpoint))
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            # beside this one, also where the run's folder has moved
            trainer.state.best_model_checkpoint = str(
                checkpoint.parent / Path(trainer.state.best_model_checkpoint).name
            )
            trainer._load_best_model()
        return TrainOutput(trainer.state.global_step, 0.0, {})

    def _load_callback_state(self) -> None:
        """Restore what callbacks have counted, but keep the patience of this run (transformers 5.23.0)."""
        handler = self.callback_handler  # type: ignore[attr-defined]
        patience = [
            each.early_stopping_patience for each in handler.callbacks if isinstance(each, EarlyStoppingCallback)
        ]
        super()._load_callback_state()  # type: ignore[misc]
        restored = [each for each in handler.callbacks if isinstance(each, EarlyStoppingCallback)]
        for each, value in zip(restored, patience, strict=True):
            each.early_stopping_patience = value

    def stop_early(self, patience: int | None) -> None:
        """Stop after so many evaluations without a better one; `None` never does."""
        if patience is not None:
            self.add_callback(EarlyStoppingCallback(patience))  # type: ignore[attr-defined]

    @contextmanager
    def unchanged_randomness(self) -> Iterator[None]:
        """Put torch's random generators back at the end: training goes on as if nothing had been drawn inside."""
        device = self.accelerator.device  # type: ignore[attr-defined]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield


def check_run(args: Any) -> None:
    """Raise a `ValueError` for settings of a run, of either trainer, that mean nothing."""
    batches = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    for name in (*batches, "num_generations", "max_completion_length", "early_stopping_patience"):
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
