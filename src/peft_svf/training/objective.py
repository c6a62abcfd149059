# SPDX-License-Identifier: Apache-2.0
"""
Rewards -> what a step follows: the estimators of the advantage, the filter of prompts, the settings of REINFORCE.

Takes rewards by prompt, and extends TRL's `GRPOConfig`. Nothing here knows a model.
"""

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..files import extra
from .retention import RetentionConfig

with extra("train", "Training needs TRL and datasets"):
    from trl import GRPOConfig, SFTConfig

Estimator = Literal["none", "batch", "batch_norm", "rloo", "group"]
Direction = Literal["policy_ref", "ref_policy"]
PAPER_BATCH = 256  # completions a step, of the paper and of its code


def advantages_of(rewards: Tensor, estimator: Estimator, num_generations: int = 1) -> Tensor:
    """
    Turn the rewards of a batch into advantages, `(N,)`: 0 if a reward is missing.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            One reward per completion, completions of a prompt side by side; NaN if it is missing.
        estimator (`str`):
            `"none"`: the reward itself, the paper's choice. `"batch"`: reward minus the mean of all others, unbiased.
            `"batch_norm"`: z-score over the batch, the reference code's option. `"rloo"`: reward minus the mean of the
            other completions of its prompt, unbiased. `"group"`: z-score over the completions of a prompt (GRPO).
        num_generations (`int`):
            Completions per prompt.
    """
    rows = rewards.view(1, -1) if estimator in ("none", "batch", "batch_norm") else rewards.view(-1, num_generations)
    valid = ~rows.isnan()
    count = valid.sum(1, keepdim=True)
    centred = rows - rows.nansum(1, keepdim=True) / count.clamp(min=1)
    squares = centred.nan_to_num(0).square().sum(1, keepdim=True)
    if estimator == "none":
        centred = rows
    elif estimator in ("batch", "rloo"):  # r - mean of the others = (r - mean) N / (N - 1)
        centred = centred * count / (count - 1).clamp(min=1)
    elif estimator == "batch_norm":
        centred = centred / (squares / count.clamp(min=1)).sqrt().clamp(min=1e-7)
    else:
        centred = centred / ((squares / (count - 1).clamp(min=1)).sqrt() + 1e-4)
    return centred.nan_to_num(0).flatten()


class PromptFilter(TrainerCallback, ExportableState):
    """
    Rests prompts whose completions all earned the same reward, always or never solved: they teach nothing for now.

    A prompt rests for one visit after the first such group and for 3, 7, 15 and 31 after further ones in a row. A
    callback, because transformers keeps the state of callbacks in its checkpoints.
    """

    def __init__(self) -> None:
        self.record: dict[str, list[int]] = {}  # by number of the row: equal groups in a row, visits still to rest

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"record": self.record}}

    def choose(self, rows: Sequence[int], total: int, seed: str) -> list[int]:
        """Replace resting rows by others of the `total`, until none is left."""
        resting = {int(row) for row, (_, rest) in self.record.items() if rest}
        free = [row for row in range(total) if row not in resting and row not in rows]
        random.Random(seed).shuffle(free)
        chosen = [free.pop() if row in resting and free else row for row in rows]
        for row in resting.intersection(rows):
            self.record[str(row)][1] -= 1
        return chosen

    def learn(self, row: int, equal: bool) -> None:
        """Note whether the completions of a row all earned the same reward."""
        streak = self.record.get(str(row), [0, 0])[0] + 1 if equal else 0
        self.record[str(row)] = [streak, min(2**streak, 32) - 1]


@dataclass
class ReinforceConfig(RetentionConfig, GRPOConfig):
    """
    TRL's `GRPOConfig` with the settings that make it REINFORCE on z-vectors, and the settings of [`RetentionConfig`].

    A step is `per_device_train_batch_size * gradient_accumulation_steps` completions; each prompt has
    `num_generations` of them. Learning rate and clipping come from the code of arXiv 2501.06252; under Adam,
    clipping gives all batches the same weight.

    Args:
        advantage_estimator (`str`):
            See [`advantages_of`]. Default `"rloo"`; with one completion per prompt `"none"` or `"batch"`.
        reward_clip (`float`, *optional*):
            Rewards are clipped to `[-reward_clip, reward_clip]` first.
        kl_direction (`str`):
            With `beta > 0` the penalty is `"policy_ref"`: KL(policy ‖ base), as in the paper, or `"ref_policy"`:
            KL(base ‖ policy), as in its code. Sets `use_bias_correction_kl`.
        prompt_filter (`bool`):
            Skip prompts whose completions all earned the same reward, see [`PromptFilter`].
        greedy_rollouts (`bool`):
            Roll out the likeliest completion, as the reference code does: biased, and for `num_generations=1` alone.
        greedy_eval (`bool`):
            Evaluate on the likeliest completion or choice.
        gradient_checkpointing (`bool`):
            Off by default, because prompts that are read once need their cache. If memory is short and completions
            are long, turn it on: then each sample reads its prompt itself while gradients are taken.
    """

    loss_type: str = "luspo"
    importance_sampling_level: str = "token"
    num_generations: int = 8
    num_generations_eval: int | None = 1
    learning_rate: float = 2e-3
    max_grad_norm: float = 1e-3
    weight_decay: float = 0.0
    beta: float = 0.0
    gradient_checkpointing: bool = False
    ddp_broadcast_buffers: bool | None = False  # processes need different numbers of forwards, which must not wait
    advantage_estimator: Estimator = "rloo"
    reward_clip: float | None = None
    kl_direction: Direction = "policy_ref"
    prompt_filter: bool = False
    greedy_rollouts: bool = False
    greedy_eval: bool = True

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        yield from super().rules()
        single, estimators, directions = self.num_generations == 1, get_args(Estimator), get_args(Direction)
        comparing = self.prompt_filter or self.advantage_estimator in ("rloo", "group")
        yield "advantage_estimator", self.advantage_estimator in estimators, f"one of {estimators}"
        yield "kl_direction", self.kl_direction in directions, f"one of {directions}"
        expected = "2 or more with advantage_estimator 'rloo' or 'group' or a prompt_filter: they compare completions"
        yield "num_generations", not (single and comparing), expected
        greedy, expected = self.greedy_rollouts, "False with more than one completion a prompt: they would be equal"
        yield "greedy_rollouts", single or not greedy, expected
        expected = "'token' with beta > 0: the others penalise no KL divergence"
        yield "importance_sampling_level", not self.beta or self.importance_sampling_level == "token", expected

    def __post_init__(self) -> None:
        self.check()
        self.use_bias_correction_kl = self.kl_direction == "policy_ref"
        if self.greedy_rollouts:
            greedy = {"temperature": 0.0} if self.use_vllm else {"do_sample": False}
            self.generation_kwargs: dict[str, Any] = {**(self.generation_kwargs or {}), **greedy}
            self.vllm_importance_sampling_correction = False  # a greedy token has log-probability 0 there
        single = self.num_generations == 1
        if single:  # GRPO's checks want groups; one that is the whole batch passes them
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            self.num_generations = self.generation_batch_size or self.per_device_train_batch_size * steps * _world()
        super().__post_init__()
        if single:
            self.num_generations = 1

    def check_rows(self, count: int) -> None:
        """Raise a `ValueError` if a step takes more prompts than there are training rows: it would never be made."""
        prompts = self.generation_batch_size // self.num_generations
        if count < prompts:
            raise ValueError(
                f"A step takes {prompts} different prompts, but the training data have {count} rows: lower "
                "per_device_train_batch_size or raise num_generations."
            )

    @classmethod
    def paper(cls, **kwargs: Any) -> "ReinforceConfig":
        """
        Follow the text of arXiv 2501.06252 (section 3.2, appendix on training); `docs/paper_map.md` has the sources.

        One sampled completion a prompt, 256 a step, the reward itself, KL to the base, AdamW at 2e-3 with cosine
        decay, the best checkpoint of a greedy validation, early stopping. The paper searches its coefficient;
        `beta=0.1` is ours, and so are the 10 steps between validations and the 5 of these that may pass without a
        better one. It needs an `eval_dataset`, or `eval_strategy="no"`, which leaves the selection out.
        """
        ours = {} if kwargs.get("eval_strategy") == "no" else {"early_stopping_patience": 5}
        return cls._preset(kwargs, beta=0.1, **ours)

    @classmethod
    def reference(cls, **kwargs: Any) -> "ReinforceConfig":
        """
        Follow the code of arXiv 2501.06252 (`SakanaAI/self-adaptive-llms` at 03a41ae), which differs from the text:
        greedy rollouts of up to 512 tokens, no penalty, a constant learning rate, no early stopping, 200 steps.

        If `beta` is set, the penalty has the direction of that code, KL(base ‖ policy).
        """
        code = {"kl_direction": "ref_policy", "greedy_rollouts": True, "max_completion_length": 512}
        return cls._preset(kwargs, lr_scheduler_type="constant", max_steps=200, **code)

    @classmethod
    def _preset(cls, kwargs: Mapping[str, Any], **settings: Any) -> "ReinforceConfig":
        """Set what text and code share: a batch of 256 without a baseline, and the best of a greedy validation."""
        settings |= {"num_generations": 1, "advantage_estimator": "none"}
        if kwargs.get("eval_strategy") != "no":
            settings |= {"eval_strategy": "steps", "eval_steps": 10, "save_steps": 10, "load_best_model_at_end": True}
        micro_batch = kwargs.get("per_device_train_batch_size", cls.per_device_train_batch_size) * _world()
        settings["gradient_accumulation_steps"] = max(1, PAPER_BATCH // micro_batch)
        return cls(**{**settings, **kwargs})


def _world() -> int:
    """Count the processes that torchrun or `accelerate launch` has announced; nothing is initialised yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


__all__ = ["PromptFilter", "ReinforceConfig", "SFTConfig", "advantages_of"]
