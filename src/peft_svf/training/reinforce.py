# SPDX-License-Identifier: Apache-2.0
"""
Model, task rows and reward -> a trained z-vector expert, by REINFORCE (arXiv 2501.06252, section 3.2).

A thin subclass of TRL's `GRPOTrainer`: data, generation, logging and checkpoints are TRL's. It adds the estimators of
the advantage, both directions of the KL penalty, a filter of prompts that teach nothing, greedy evaluation, prompts
that are read once for all of their samples, and rows of the choice form, whose action is one of the row's `choices`
and whose policy is the softmax of their summed token log-likelihoods. Private names of TRL were read in 1.16.
"""

import json
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import GenerationConfig, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import is_torch_bf16_gpu_available

from ..evaluation import choice_logps
from ..reading import (
    Prompts,
    Reading,
    can_share,
    checkpoints_activations,
    completion_logps,
    distinct_prompts,
    distinct_rows,
    read_prompts,
    shared_prompts,
)
from ..tuner.model import SVFModel
from .run import Run, check_counts, check_prompts, checked_reward, z_statistics

try:
    from accelerate.utils import gather_object
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError("Training needs TRL and datasets: pip install 'peft-svf[train]'") from error

logger = logging.getLogger(__name__)
Estimator = Literal["none", "batch", "batch_norm", "rloo", "group"]
Direction = Literal["policy_ref", "ref_policy"]
PAPER_BATCH = 256  # completions a step, of the paper and of its code


def advantages_of(rewards: Tensor, estimator: Estimator, num_generations: int = 1) -> Tensor:
    """
    Turn the rewards of a batch into advantages.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            One reward per completion, completions of a prompt side by side; NaN if it is missing.
        estimator (`str`):
            `"none"`: the reward itself, the paper's choice. `"batch"`: reward minus the mean of all others, unbiased.
            `"batch_norm"`: z-score over the batch, the reference code's option. `"rloo"`: reward minus the mean of the
            other completions of its prompt, unbiased. `"group"`: z-score over the completions of a prompt (GRPO).
        num_generations (`int`):
            Completions per prompt.

    Returns:
        `torch.Tensor` of shape `(N,)`: 0 if the reward is NaN.
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
class ReinforceConfig(GRPOConfig):
    """
    TRL's `GRPOConfig` with the settings that make it REINFORCE on z-vectors, and a few more.

    A step is `per_device_train_batch_size * gradient_accumulation_steps` completions; each prompt has
    `num_generations` of them. Learning rate and clipping are those of the code of arXiv 2501.06252; under Adam,
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
            Roll out the likeliest completion instead of a sample, as the reference code does. That is biased, and
            `num_generations` has to be 1.
        greedy_eval (`bool`):
            Evaluate on the likeliest completion or choice.
        early_stopping_patience (`int`, *optional*):
            Stop after so many evaluations without a better one.
        keep_text (`float`, *optional*):
            At each evaluation, stop if the base's own answers to everyday requests are less likely per token than
            before by more than this share, such as 0.02. The best checkpoint is then an earlier one.
        stop_after_dead_steps (`int`, *optional*):
            Stop after so many steps in a row that taught nothing: equal rewards, or no gradient. The first such step
            is reported with the way out.
        gradient_checkpointing (`bool`):
            Off by default, because prompts that are read once need their cache. If memory is short and completions
            are long, turn it on: then each sample reads its prompt itself while gradients are taken.
    """

    loss_type: str = "luspo"
    importance_sampling_level: str = "token"
    num_generations: int = 8
    num_generations_eval: int | None = 1
    learning_rate: float = 2e-3
    lr_scheduler_type: str = "cosine"
    max_grad_norm: float = 1e-3
    weight_decay: float = 0.0
    beta: float = 0.0
    metric_for_best_model: str | None = "eval_reward"
    restore_callback_states_from_checkpoint: bool = True  # early stopping and the filter go on counting
    gradient_checkpointing: bool = False
    ddp_broadcast_buffers: bool | None = False  # processes need different numbers of forwards, which must not wait
    advantage_estimator: Estimator = "rloo"
    reward_clip: float | None = None
    kl_direction: Direction = "policy_ref"
    prompt_filter: bool = False
    greedy_rollouts: bool = False
    greedy_eval: bool = True
    early_stopping_patience: int | None = None
    stop_after_dead_steps: int | None = None
    keep_text: float | None = None

    def __post_init__(self) -> None:
        check_counts(self)
        single = self.num_generations == 1
        allowed = {"advantage_estimator": get_args(Estimator), "kl_direction": get_args(Direction)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {values}; got {getattr(self, name)!r}.")
        if single and (self.prompt_filter or self.advantage_estimator in ("rloo", "group")):
            raise ValueError(
                f"num_generations is 1, but advantage_estimator={self.advantage_estimator!r} with prompt_filter="
                f"{self.prompt_filter} compares the completions of a prompt: set 2 or more, or 'none' or 'batch' "
                "without a filter."
            )
        best = self.metric_for_best_model or "reward"
        measured = ["reward", "reward_std", "entropy", "loss", "/mean", "_length"]
        if not best.endswith((*measured, "kl") if self.beta else tuple(measured)):  # else the first evaluation fails
            raise ValueError(f"metric_for_best_model={best!r} isn't measured by an evaluation: use 'eval_reward'.")
        if self.greedy_rollouts and not single:
            raise ValueError(f"greedy_rollouts draws {self.num_generations} equal completions: set num_generations=1.")
        if self.beta and self.importance_sampling_level != "token":
            raise ValueError("With beta > 0 only importance_sampling_level='token' penalises a KL divergence.")
        if self.bf16 is None:  # type: ignore[has-type]  # TRL's default asks a GPU for it, whatever the machine has
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        self.use_bias_correction_kl = self.kl_direction == "policy_ref"
        if self.greedy_rollouts:
            greedy = {"temperature": 0.0} if self.use_vllm else {"do_sample": False}
            self.generation_kwargs: dict[str, Any] = {**(self.generation_kwargs or {}), **greedy}
            self.vllm_importance_sampling_correction = False  # a greedy token has log-probability 0 there
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


@dataclass
class Batch:
    """
    The state that the hooks of one rollout share.

    Args:
        inputs (`list[dict]`): The row of each completion.
        numbers (`list[int]`): With a prompt filter, the number of each prompt's row in the data, of all processes.
        rows (`list[dict]`): The distinct rows, in the choice form; a row's place stands for its prompt.
        rewards (`torch.Tensor` of shape `(N, functions)`): Of the completions of all processes.
        prompts ([`Prompts`]), read ([`Reading`]): With answers of one token, the reading that they were drawn from.
    """

    inputs: list[dict[str, Any]]
    numbers: list[int] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    rewards: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    prompts: Prompts | None = None
    read: Reading | None = None


class ReinforceTrainer(Run, GRPOTrainer):
    """
    Train z-vectors, or any PEFT adapter, by REINFORCE.

    In the choice form an action is a whole choice, whose text TRL never sees: the "prompt" of a row is one token, its
    place among the distinct rows of the batch, and the "completion" is one token, the number of the choice. TRL pads,
    shuffles and splits these like any tokens; the hook that computes log-probabilities turns them back into rows and
    scores their choices. So nothing of TRL's loss has to be copied.

    Args:
        model (`str` or `PreTrainedModel` or `PeftModel`):
            As in `GRPOTrainer`; with `peft_config` the reference of the KL penalty is the base model.
        reward_funcs (`Callable` or `list`):
            `(completions, **columns) -> list[float]`, such as `Task.reward`.
        args ([`ReinforceConfig`]):
            The settings.
        train_dataset, eval_dataset (`datasets.Dataset`):
            Rows with `prompt`, and with `choices` for the choice form. Other columns go to the reward.
        kwargs:
            Everything else that `GRPOTrainer` takes.

    Raises:
        `ValueError`: if nothing would be trained, or all of a plain model; if the data have fewer rows than a step
            takes prompts, or prompts that the model cannot read; for rows with `choices` under FSDP.
    """

    def __init__(
        self, model: Any, reward_funcs: Any, args: ReinforceConfig, train_dataset: Any = None, **kwargs: Any
    ) -> None:
        self._choice_form = "choices" in _columns(train_dataset)
        self._batches: dict[str, Batch] = {}  # by train and eval
        if self._choice_form:
            for name in {"gradient_checkpointing", "activation_checkpointing"} & set(vars(args)):
                setattr(args, name, False)  # the prompt's cache is shared by its choices
            args.mask_truncated_completions = False  # a choice is never cut off
            args.pad_to_multiple_of = None  # its number takes one place
        self.check_adapter(model, args, kwargs.get("peft_config"))
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        rewards = [checked_reward(function) for function in functions]
        with _without_luspo_advice():
            super().__init__(model=model, reward_funcs=rewards, args=args, train_dataset=train_dataset, **kwargs)
        if self._choice_form and self.is_fsdp_enabled:
            raise ValueError(
                "Rows with `choices` cannot be trained under FSDP: processes need different numbers of forwards for "
                "them, and FSDP gathers weights in each. Use DDP, or the generated form."
            )
        if isinstance(self.train_dataset, Sized):
            args.check_rows(len(self.train_dataset))
        check_prompts(self.model, self.processing_class, self.train_dataset)
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()  # TRL makes them bfloat16 on quantised bases
        if isinstance(tuner := getattr(self.model, "base_model", None), SVFModel):
            plan = tuner.peft_config[tuner.active_adapters[0]].plan
            tuner.set_plan(plan, forwards_per_step=args.gradient_accumulation_steps)
        self.watch()
        if args.prompt_filter:
            data = self.train_dataset
            data = data.select_columns([name for name in ("prompt", "choices", "id") if name in _columns(data)])
            self._numbers = {_key(data[number]): number for number in range(len(data))}  # images stay unread
            self.add_callback(PromptFilter())

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """
        Evaluate as `GRPOTrainer` does, on greedy completions unless `greedy_eval=False`.

        The random generators are put back: training goes on as if it had not been interrupted.
        """
        with self.unchanged_randomness(), self._greedy() if self.args.greedy_eval else nullcontext():
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def _greedy(self) -> Iterator[None]:
        """Generate the likeliest completions while the context is open."""
        if self.args.use_vllm:
            holder, name, greedy = self.vllm_generation, "temperature", 0.0
        else:
            off = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            greedy = GenerationConfig.from_dict({**self.generation_config.to_dict(), **off})  # type: ignore[has-type]
            holder, name = self, "generation_config"
        before = getattr(holder, name)
        setattr(holder, name, greedy)
        try:
            yield
        finally:
            setattr(holder, name, before)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Repeat the shuffles of the epochs before a checkpoint; TRL's sampler begins with the first again."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        for _ in range(self.epochs_done):
            next(iter(sampler), None)
        return sampler

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        if self.args.reward_clip is not None:
            rewards = rewards.clamp(-self.args.reward_clip, self.args.reward_clip)
        self._batches[self._mode].rewards = rewards
        return rewards

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Put the samples of a prompt into one micro-batch, if a step takes all micro-batches of a rollout."""
        before: Any = self._buffered_inputs  # type: ignore[has-type]
        inputs = super()._prepare_inputs(generation_batch)
        parts: Any = self._buffered_inputs  # type: ignore[has-type]
        if not self.model.training or parts is before or len(parts) == 1 or not self._on_policy:
            return inputs
        if all(isinstance(value, Tensor) for part in parts for value in part.values()):
            self._buffered_inputs = _grouped(parts)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    @property
    def _on_policy(self) -> bool:
        """True if each rollout serves one optimizer step."""
        return self.num_iterations == 1 and self.args.gradient_accumulation_steps % self.args.steps_per_generation == 0

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = self._mode
        filtered = mode == "train" and self.args.prompt_filter
        batch = self._batches[mode] = self._filtered(inputs) if filtered else Batch(inputs)
        output = super()._generate_and_score_completions(batch.inputs)
        weights = self.reward_weights.to(batch.rewards.device)
        rewards = (batch.rewards * weights).nansum(1)
        rewards[batch.rewards.isnan().all(1)] = torch.nan
        if (self.num_generations_eval if mode == "eval" else self.num_generations) == 1:
            self._metrics[mode].pop("frac_reward_zero_std", None)  # always 1 for a group of one
        if mode == "eval":
            return output
        if self.args.advantage_estimator != "group":
            advantages = advantages_of(rewards, self.args.advantage_estimator, self.num_generations)
            start = self.accelerator.process_index * len(inputs)
            output["advantages"] = advantages[start : start + len(inputs)]
            logged = self._logs["advantages"]
            for index, value in enumerate(advantages.tolist(), start=len(logged) - len(advantages)):
                logged[index] = value
        if filtered:
            groups = rewards.view(-1, self.num_generations)  # NaN, a missing reward, equals any
            equal = groups.nan_to_num(nan=-torch.inf).amax(1) <= groups.nan_to_num(nan=torch.inf).amin(1)
            for number, is_equal in zip(batch.numbers, equal.tolist(), strict=True):
                self._filter.learn(number, is_equal)
        self.dead_reason = self._dead_reason(output, rewards)
        for name, value in z_statistics(self.model).items():
            self._metrics[mode][name].append(value)
        return output

    def _dead_reason(self, output: Mapping[str, Any], rewards: Tensor) -> str | None:
        """Explain why the completions of this process teach nothing, with the way out; `None` if they do."""
        if self.mask_truncated_completions and not output["completion_mask"].any():
            return (
                f"All completions were cut off at max_completion_length={self.args.max_completion_length}, and "
                "mask_truncated_completions=True leaves nothing of them: raise max_completion_length, or set it to "
                "False (answers of one token never end by themselves)."
            )
        if output["advantages"].any():
            return None
        texts = {str(text) for text in list(self._logs["completion"])[-len(rewards) :]}
        if len(texts) * self.num_generations <= len(rewards):
            return (
                f"The policy gives one answer to each prompt at temperature={self.temperature:g}: raise the "
                "temperature, or start again with a lower learning_rate or with beta > 0, which keeps the entropy."
            )
        return (
            f"All rewards of a prompt are equal (mean {rewards.nanmean():.3g}), which leaves no advantage: take "
            "prompts that the model solves sometimes, more num_generations, a higher temperature, or a reward "
            "with more than two values."
        )

    @property
    def _filter(self) -> PromptFilter:
        """Looked up each time, because resuming replaces callbacks by restored ones."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, PromptFilter))

    def _filtered(self, inputs: list[dict[str, Any]]) -> Batch:
        """Replace the rows of resting prompts; all processes choose the same."""
        numbers = gather_object([self._numbers[_key(row)] for row in inputs])[:: self.num_generations]
        seed = f"{self.args.seed}:{self.state.global_step}:{numbers}"  # the same in a resumed run
        chosen = self._filter.choose(numbers, len(self.train_dataset), seed)
        changed = [old != new for old, new in zip(numbers, chosen, strict=True)]
        self._metrics["train"]["prompts/replaced"].append(sum(changed) / len(changed))
        start = self.accelerator.process_index * len(inputs)
        places = [(start + i) // self.num_generations for i in range(len(inputs))]
        rows = [self.train_dataset[chosen[k]] if changed[k] else row for k, row in zip(places, inputs, strict=True)]
        return Batch(rows, chosen)

    def _generate(self, prompts: list) -> Any:
        if not self._choice_form:
            return super()._generate(prompts)
        device, mode = self.accelerator.device, self._mode
        batch = self._batches[mode]
        keys = [_key(row) for row in batch.inputs]
        distinct = dict(zip(keys, batch.inputs, strict=True))
        places = {key: place for place, key in enumerate(distinct)}
        which, batch.rows = [places[key] for key in keys], list(distinct.values())
        with torch.no_grad():
            policy = self._policy(self.model, torch.arange(len(batch.rows)), mode)
        logps = policy[torch.tensor(which, device=device)]
        greedy = self.args.greedy_eval if mode == "eval" else self.args.greedy_rollouts
        picks = logps.argmax(-1) if greedy else torch.multinomial(logps.exp(), 1).squeeze(1)
        texts = [row["choices"][k] for row, k in zip(batch.inputs, picks.tolist(), strict=True)]
        chat = not isinstance(batch.inputs[0]["prompt"], str)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
        picked = self.accelerator.gather(logps.gather(1, picks[:, None]).exp().mean()).mean().item()
        self._metrics[mode]["choices/probability"].append(picked)
        return [[i] for i in which], [[k] for k in picks.tolist()], None, completions, None, {}, None, []

    def _generate_single_turn(self, prompt_ids: list[list[int]], images: Any, *args: Any, **kwargs: Any) -> Any:
        if self.use_vllm or self.is_fsdp_enabled:
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
        if images is None and self._draws_one_token() and (prompts := distinct_rows(prompt_ids)) is not None:
            return self._one_token(prompts), None
        with shared_prompts(self.model):
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)

    def _draws_one_token(self) -> bool:
        """True if one forward can be both sampled from and differentiated: one token, nothing but a temperature."""
        config, off = self.generation_config, (None, 0, 1.0)
        shaped = {config.top_p, config.top_k, config.min_p, config.repetition_penalty}.difference(off)
        others = set(self.args.generation_kwargs or {}) - {"do_sample"}
        return (
            self._mode == "train"
            and self.max_completion_length == 1
            and self._on_policy
            and self.args.steps_per_generation == 1  # else the graphs of several micro-batches would be kept
            and not (shaped or others or self.rollout_func or self.tools or self.use_transformers_continuous_batching)
            and self.model_wrapped is self.model  # the wrapper of DDP has to see the forward that is differentiated
            and self._can_share(self.model, {})
        )

    def _one_token(self, prompts: Prompts) -> list[list[int]]:
        """Draw answers of one token, and keep the reading for the loss."""
        with self.accelerator.autocast():
            read = read_prompts(self.model, prompts.distinct)
        self._batches["train"].prompts, self._batches["train"].read = prompts, read
        scores = read.logits.detach().float()[prompts.places] / self.temperature  # (B, vocabulary)
        greedy = self.args.greedy_rollouts
        tokens = scores.argmax(-1) if greedy else torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        return [[token] for token in tokens.tolist()]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self._choice_form:
            numbers, places = torch.unique(input_ids[:, 0], return_inverse=True)
            logps = self._policy(model, numbers, self._mode)[places]  # (B, K)
            finite = logps.clamp(min=-1e4)  # absent choices have probability 0, and 0 * -inf would be NaN
            entropies = -(finite.exp() * finite).sum(-1, keepdim=True) if kwargs.get("compute_entropy") else None
            return logps.gather(1, input_ids[:, 1:2]), entropies, None
        if not self._can_share(model, kwargs):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs
            )
        parts = []
        size = batch_size or len(input_ids)
        for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            asked, seen = ids[:, :-logits_to_keep], mask[:, :-logits_to_keep]
            if (prompts := distinct_prompts(asked, seen)) is None:
                whole = super()._get_per_token_logps_and_entropies(model, ids, mask, logits_to_keep, **kwargs)
                parts.append(whole[:2])
                continue
            prompts, read = self._kept_reading(prompts) if torch.is_grad_enabled() else (prompts, None)
            completions = ids[:, -logits_to_keep:], mask[:, -logits_to_keep:]
            with self.accelerator.autocast():
                parts.append(completion_logps(model, prompts, *completions, self.temperature, read))
        entropies = torch.cat([part[1] for part in parts]) if kwargs.get("compute_entropy") else None
        return torch.cat([part[0] for part in parts]), entropies, None

    def _kept_reading(self, prompts: Prompts) -> tuple[Prompts, Reading | None]:
        """Look prompts, which TRL has shuffled, up in the rollout that kept its graph; it is used once."""
        batch = self._batches["train"]
        kept, read, batch.prompts, batch.read = batch.prompts, batch.read, None, None
        if kept is None:
            return prompts, None
        numbers = {tuple(prompt): number for number, prompt in enumerate(kept.distinct)}
        places = torch.tensor([numbers[tuple(prompt)] for prompt in prompts.distinct], device=prompts.places.device)
        return Prompts(kept.distinct, places[prompts.places]), read

    def _can_share(self, model: Any, kwargs: Mapping[str, Any]) -> bool:
        """True if prompts can be read once: text alone, a cache, and equally many forwards on all processes."""
        others = any(
            value is not None and value is not False for key, value in kwargs.items() if key != "compute_entropy"
        )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return not (others or sharded or checkpoints_activations(model)) and can_share(model)

    def _policy(self, model: Any, numbers: Tensor, mode: str) -> Tensor:
        """Compute log-probabilities `(rows, choices)` of the choices of the numbered rows, at `temperature`."""
        rows = [self._batches[mode].rows[number] for number in numbers.tolist()]
        with self.accelerator.autocast():
            logps = choice_logps(model, self.processing_class, rows)
        return (logps / self.temperature).log_softmax(-1)


def _key(row: Mapping[str, Any]) -> str:
    """Identify the question of a row; those with images differ by `id`."""
    return json.dumps([row.get("prompt"), row.get("choices"), row.get("id")], default=str)


def _grouped(parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Sort the rows of micro-batches so that equal prompts share a micro-batch, which then reads them once."""
    order = torch.unique(torch.cat([part["prompt_ids"] for part in parts]), dim=0, return_inverse=True)[1].argsort()
    whole = {
        key: torch.cat([part[key] for part in parts])[order].chunk(len(parts)) if value.dim() else None
        for key, value in parts[0].items()
    }
    return [
        {key: part[key] if chunks is None else chunks[number] for key, chunks in whole.items()}
        for number, part in enumerate(parts)
    ]


def _columns(dataset: Any) -> Sequence[str]:
    """List the columns of any dataset; those of a stream may be known from its first row alone."""
    if dataset is None:
        return ()
    return getattr(dataset, "column_names", None) or list(next(iter(dataset), {}))


@contextmanager
def _without_luspo_advice() -> Iterator[None]:
    """
    Drop TRL's advice to pair luspo with sequence-level ratios while the context is open.

    It concerns clipping off policy. On policy the two have one gradient, and a KL penalty needs ratios per token.
    """
    source, advice = (
        logging.getLogger(GRPOTrainer.__module__),
        "When using `'luspo'` loss, `importance_sampling_level`",
    )
    without = logging.Filter()
    without.filter = lambda record: advice not in record.getMessage()  # type: ignore[method-assign]
    source.addFilter(without)
    try:
        yield
    finally:
        source.removeFilter(without)


__all__ = ["PromptFilter", "ReinforceConfig", "ReinforceTrainer", "advantages_of"]
