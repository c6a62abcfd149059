# SPDX-License-Identifier: Apache-2.0
"""
Model, task rows and reward -> a trained z-vector expert, by REINFORCE (arXiv 2501.06252, section 3.2).

A thin subclass of TRL's `GRPOTrainer`: data, generation, logging and checkpoints are TRL's. What is ours: the
estimators of the advantage, both directions of the KL penalty and its form in the reward, a filter of prompts that
teach nothing, greedy evaluation, and rows of the choice form, whose action is one of the
row's `choices` and whose policy is the softmax of their summed token log-likelihoods. Private names of TRL were read
in 1.16.
"""

import inspect
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..evaluation import choice_logps
from ..tuner.model import SVFModel
from .rollout import can_share, checkpoints_activations, completion_logps, distinct_prompts, shared_prompts
from .run import PromptFilter, Run, check_run, z_statistics

try:
    from accelerate.utils import gather_object
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError("Training needs TRL and datasets: pip install 'peft-svf[train]'") from error

logger = logging.getLogger(__name__)
Estimator = Literal["none", "batch", "batch_norm", "rloo", "group"]
PAPER_BATCH = 256  # completions a step, of the paper and of its code
SURE = 0.6  # mean probability of a pick from which a higher temperature learned more: GSM8K .64, MBPP .92


def advantages_of(rewards: Tensor, estimator: Estimator, num_generations: int = 1) -> Tensor:
    """
    Turn the rewards of a batch into advantages.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            One reward per completion, completions of a prompt side by side; NaN where none could be given.
        estimator (`str`):
            `"none"`: the reward itself, the paper's choice. `"batch"`: reward minus the mean of all others, unbiased.
            `"batch_norm"`: z-score over the batch, the reference code's option. `"rloo"`: reward minus the mean of the
            other completions of its prompt, unbiased. `"group"`: z-score over the completions of a prompt (GRPO).
        num_generations (`int`):
            Completions per prompt.

    Returns:
        `torch.Tensor` of shape `(N,)`: 0 where the reward is NaN.
    """
    rows = rewards.view(1, -1) if estimator in ("none", "batch", "batch_norm") else rewards.view(-1, num_generations)
    valid = ~rows.isnan()
    count = valid.sum(1, keepdim=True)
    mean = rows.nansum(1, keepdim=True) / count.clamp(min=1)
    centred = rows - mean
    if estimator == "none":
        centred = rows
    elif estimator in ("batch", "rloo"):  # r - mean of the others = (r - mean) N / (N - 1)
        centred = centred * count / (count - 1).clamp(min=1)
    else:
        variance = centred.nan_to_num(0).square().sum(1, keepdim=True)
        if estimator == "batch_norm":
            centred = centred / (variance / count.clamp(min=1)).sqrt().clamp(min=1e-7)
        else:
            centred = centred / ((variance / (count - 1).clamp(min=1)).sqrt() + 1e-4)
    return centred.nan_to_num(0).flatten()


@dataclass
class ReinforceConfig(GRPOConfig):
    """
    TRL's `GRPOConfig` with the settings that make it REINFORCE on z-vectors, and a few of its own.

    A step is `per_device_train_batch_size * gradient_accumulation_steps` completions; each prompt has
    `num_generations` of them. The defaults suit SVF: learning rate 2e-3, cosine schedule, no weight decay, gradient
    clipping at 1e-3. Rate and clipping are those of the code of arXiv 2501.06252; under Adam the latter evens out
    batches.

    Args:
        advantage_estimator (`str`):
            See [`advantages_of`]. Default `"rloo"`; with one completion per prompt `"none"` or `"batch"`.
        reward_clip (`float`, *optional*):
            Rewards are clipped to `[-reward_clip, reward_clip]` first.
        kl_direction (`str`):
            With `beta > 0` the penalty is `"policy_ref"`: KL(policy ‖ base), the paper's, or `"ref_policy"`:
            KL(base ‖ policy), that of its code.
        kl_in_reward (`bool`):
            Subtract the penalty from the reward instead of adding it to the loss: `r - beta * Σ (log p - log p_ref)`
            over the tokens of a completion (k1), which is KL(policy ‖ base) again. TRL's `RLOOTrainer` does so.
        prompt_filter (`bool`):
            Pass over prompts whose completions all earned the same reward, see [`PromptFilter`].
        greedy_rollouts (`bool`):
            Roll out the likeliest completion instead of a sample, as the reference code does (biased; one completion
            per prompt).
        greedy_eval (`bool`):
            Evaluate on the likeliest completion or choice.
        early_stopping_patience (`int`, *optional*):
            Stop after so many evaluations without a better one.
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
    gradient_checkpointing: bool = False  # it drops the cache, and each sample reads its prompt itself
    # Bases are buffers and never change. Sent at each forward, they would wait for processes whose rows need fewer.
    ddp_broadcast_buffers: bool | None = False
    advantage_estimator: Estimator = field(default="rloo", metadata={"help": "How rewards become advantages."})
    reward_clip: float | None = field(default=None, metadata={"help": "Clip rewards to [-x, x]."})
    kl_direction: Literal["policy_ref", "ref_policy"] = field(default="policy_ref", metadata={"help": "Which KL."})
    kl_in_reward: bool = field(default=False, metadata={"help": "Subtract the penalty from the reward."})
    prompt_filter: bool = field(default=False, metadata={"help": "Pass over prompts that teach nothing."})
    greedy_rollouts: bool = field(default=False, metadata={"help": "Roll out the likeliest completion."})
    greedy_eval: bool = field(default=True, metadata={"help": "Evaluate on the likeliest completion."})
    early_stopping_patience: int | None = field(default=None, metadata={"help": "Evaluations without a better one."})

    def __post_init__(self) -> None:
        self._check()
        single = self.num_generations == 1
        self.use_bias_correction_kl = self.kl_direction == "policy_ref"
        if self.greedy_rollouts:
            greedy = {"temperature": 0.0} if self.use_vllm else {"do_sample": False}
            self.generation_kwargs: dict[str, Any] = {**(self.generation_kwargs or {}), **greedy}
            self.vllm_importance_sampling_correction = False  # a greedy token has log-probability 0 there
        if single:  # GRPO's checks want groups; one that is the whole batch passes them
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            self.num_generations = self.generation_batch_size or self.per_device_train_batch_size * steps * _world()
            if self.num_generations == 1:
                raise ValueError(
                    "A generation batch of 1 has no gradient to speak of: raise per_device_train_batch_size."
                )
        super().__post_init__()
        if single:
            self.num_generations = 1
        self._warn_of_checkpoints_between_rollouts()

    def _check(self) -> None:
        """Refuse settings that mean nothing, before TRL sees them."""
        check_run(self)
        for name, fits, what in (
            ("temperature", self.temperature > 0, "above 0"),
            ("beta", self.beta >= 0, "0 or more"),
            ("reward_clip", self.reward_clip is None or self.reward_clip > 0, "above 0"),
        ):
            if not fits:
                raise ValueError(f"`{name}` must be {what}; got {getattr(self, name)}.")
        single = self.num_generations == 1
        if self.advantage_estimator not in ("none", "batch", "batch_norm", "rloo", "group"):
            raise ValueError(f"`advantage_estimator` cannot be {self.advantage_estimator!r}.")
        if single and self.advantage_estimator in ("rloo", "group"):
            raise ValueError(
                f"advantage_estimator={self.advantage_estimator!r} compares the completions of a prompt, but "
                "num_generations is 1: use 'none' or 'batch', or 2 generations and more."
            )
        if self.multi_objective_aggregation != "sum_then_normalize" and (
            self.advantage_estimator != "group" or self.kl_in_reward
        ):
            raise ValueError(
                f"multi_objective_aggregation={self.multi_objective_aggregation!r} normalises as GRPO does: it needs "
                "advantage_estimator='group' and kl_in_reward=False."
            )
        if single and self.prompt_filter:
            raise ValueError("prompt_filter compares the completions of a prompt: set num_generations to 2 or more.")
        if self.greedy_rollouts and not single:
            raise ValueError(f"greedy_rollouts gives {self.num_generations} equal completions: set num_generations=1.")
        if self.kl_direction not in ("policy_ref", "ref_policy"):
            raise ValueError(f"`kl_direction` must be 'policy_ref' or 'ref_policy', got {self.kl_direction!r}.")
        if self.kl_in_reward and (not self.beta or self.kl_direction != "policy_ref"):
            raise ValueError(
                "kl_in_reward subtracts beta times KL(policy ‖ base): it needs beta > 0 and "
                f"kl_direction='policy_ref', got beta={self.beta} and kl_direction={self.kl_direction!r}."
            )
        if not self.use_bias_correction_kl and self.kl_direction == "policy_ref":
            raise ValueError("use_bias_correction_kl follows kl_direction: set kl_direction='ref_policy'.")
        if self.beta and not self.kl_in_reward and self.importance_sampling_level != "token":
            raise ValueError("With beta > 0 only importance_sampling_level='token' penalises a KL divergence.")

    def check_rows(self, count: int) -> None:
        """Raise a `ValueError` if a step takes more different prompts than there are training rows."""
        prompts = self.generation_batch_size // self.num_generations
        if count < prompts:
            raise ValueError(
                f"A step takes {prompts} different prompts, but the training data have {count} rows: lower "
                "per_device_train_batch_size or raise num_generations."
            )

    def _warn_of_checkpoints_between_rollouts(self) -> None:
        """Rollouts in use are not part of a checkpoint: a run resumed among them rolls out anew."""
        every = max(1, self.steps_per_generation * self.num_iterations // self.gradient_accumulation_steps)
        if self.save_strategy == "steps" and self.save_steps >= 1 and self.save_steps % every:  # below 1 it is a share
            logger.warning(
                f"A rollout serves {every} steps, but save_steps={self.save_steps}: a run that resumes from a "
                f"checkpoint between them is not the uninterrupted one. Set save_steps to a multiple of {every}."
            )

    @classmethod
    def paper(cls, **kwargs: Any) -> "ReinforceConfig":
        """
        The text of arXiv 2501.06252 (section 3.2 and its appendix on training); `docs/paper_map.md` has the sources.

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
        What the code of arXiv 2501.06252 does (`SakanaAI/self-adaptive-llms` at 03a41ae), where it differs from the
        text: greedy rollouts of up to 512 tokens, no penalty, a constant learning rate, no early stopping.

        A penalty, where `beta` is set, has its direction, KL(base ‖ policy). Length is that of its runs, 200 steps.
        """
        code = {"kl_direction": "ref_policy", "greedy_rollouts": True, "max_completion_length": 512}
        return cls._preset(kwargs, lr_scheduler_type="constant", max_steps=200, **code)

    @classmethod
    def _preset(cls, kwargs: Mapping[str, Any], **settings: Any) -> "ReinforceConfig":
        """What text and code agree on: a batch of 256 without a baseline, and the best of a greedy validation."""
        settings |= {"num_generations": 1, "advantage_estimator": "none"}
        if kwargs.get("eval_strategy") != "no":
            settings |= {"eval_strategy": "steps", "eval_steps": 10, "save_steps": 10, "load_best_model_at_end": True}
        micro_batch = kwargs.get("per_device_train_batch_size", cls.per_device_train_batch_size) * _world()
        settings["gradient_accumulation_steps"] = max(1, PAPER_BATCH // micro_batch)
        return cls(**{**settings, **kwargs})


def _world() -> int:
    """The number of processes, as torchrun and `accelerate launch` announce it before anything is initialised."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class ReinforceTrainer(Run, GRPOTrainer):
    """
    Train z-vectors, or any PEFT adapter, by REINFORCE.

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
        `ValueError`: if the data have fewer rows than a step takes prompts, or rows with `choices` are to be trained
            under FSDP.
    """

    def __init__(
        self, model: Any, reward_funcs: Any, args: ReinforceConfig, train_dataset: Any = None, **kwargs: Any
    ) -> None:
        self._choice_form = "choices" in _columns(train_dataset)
        self._rows: dict[str, list[dict[str, Any]]] = defaultdict(list)  # of the batch at hand, by train and eval
        if self._choice_form:
            for name in {"gradient_checkpointing", "activation_checkpointing"} & set(vars(args)):
                setattr(args, name, False)  # the prompt's cache is shared by its choices
            args.mask_truncated_completions = False  # a choice is never cut off
            args.pad_to_multiple_of = None  # its number takes one place
        with _without_luspo_remark():
            super().__init__(model=model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        if self._choice_form and self.is_fsdp_enabled:
            raise ValueError(
                "Rows with `choices` cannot be trained under FSDP: processes need different numbers of forwards for "
                "them, and FSDP gathers weights in each. Use DDP, or the generated form."
            )
        if isinstance(self.train_dataset, Sized):
            args.check_rows(len(self.train_dataset))
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()  # TRL makes them bfloat16 on quantised bases
        if isinstance(tuner := getattr(self.model, "base_model", None), SVFModel):
            plan = tuner.peft_config[tuner.active_adapters[0]].plan
            tuner.set_plan(plan, forwards_per_step=args.gradient_accumulation_steps)
        self.stop_early(args.early_stopping_patience)
        if args.prompt_filter:
            self._number_rows()
            self.add_callback(PromptFilter())

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """
        Evaluate as `GRPOTrainer` does, on greedy completions unless `greedy_eval=False`.

        The state of the random generators is put back: training goes on as if there had been no evaluation.
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
        """TRL's, after the shuffles that the run to be resumed has made: by itself it begins with the first again."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        for _ in range(self.epochs_done):
            next(iter(sampler), None)
        return sampler

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        if self.args.reward_clip is not None:
            rewards = rewards.clamp(-self.args.reward_clip, self.args.reward_clip)
        self._rewards = rewards  # (N over all processes, reward functions)
        return rewards

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if not self.args.kl_in_reward:
            return super().compute_loss(*args, **kwargs)
        self.beta = 0.0  # the reward has it already
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            self.beta = self.args.beta

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = self._mode
        if mode == "train" and self.args.prompt_filter:
            inputs = self._filtered(inputs)
        self._inputs = inputs
        output = super()._generate_and_score_completions(inputs)
        weights = self.reward_weights.to(self._rewards.device)
        rewards = (self._rewards * weights).nansum(1)
        rewards[self._rewards.isnan().all(1)] = torch.nan
        group = self.num_generations if mode == "train" else self.num_generations_eval
        if mode == "train" and self.args.prompt_filter:
            self._learn(rewards)
        if self.args.kl_in_reward:
            rewards = rewards - self.args.beta * self.accelerator.gather(self._divergence(output))
        if mode == "train" and (self.args.advantage_estimator != "group" or self.args.kl_in_reward):
            advantages = advantages_of(rewards, self.args.advantage_estimator, group)
            start = self.accelerator.process_index * len(inputs)
            output["advantages"] = advantages[start : start + len(inputs)]
            logged = self._logs["advantages"]
            for index, value in enumerate(advantages.tolist(), start=len(logged) - len(advantages)):
                logged[index] = value
        if group == 1:
            self._metrics[mode].pop("frac_reward_zero_std", None)  # always 1 for a group of one
        if mode == "train":
            for name, value in z_statistics(self.model).items():
                self._metrics[mode][name].append(value)
        return output

    @torch.no_grad()
    def _divergence(self, output: dict[str, Any]) -> Tensor:
        """`log p - log p_ref` of each completion `(B,)`, summed over its tokens or choice (k1); logs it per token."""
        logps = output.get("old_per_token_logps")
        mask = output["completion_mask"] * output.get("tool_mask", 1)  # (B, C)
        if logps is None:
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
            attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
            known = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters  # images and the like
            logps, _, _ = self._get_per_token_logps_and_entropies(
                self.model,
                ids,
                attention,
                mask.shape[1],
                batch_size=len(ids) if self._mode == "eval" else self.args.per_device_train_batch_size,
                **{name: value for name, value in output.items() if name in known},
            )
        k1 = (logps - output["ref_per_token_logps"]) * mask
        total = self.accelerator.reduce(torch.stack([k1.sum(), mask.sum()]), reduction="sum")
        self._metrics[self._mode]["kl"].append((total[0] / total[1].clamp(min=1)).item())
        return k1.sum(1)

    # Prompts that teach nothing: rows are known by their number, all processes choose alike. -----------------------

    def _number_rows(self) -> None:
        if not isinstance(self.train_dataset, Sized):
            raise ValueError("prompt_filter puts other rows in the place of some: it needs data with a length.")
        data: Any = self.train_dataset
        asked = [name for name in ("prompt", "choices", "id") if name in _columns(data)]
        rows = data.select_columns(asked)  # images stay unread
        self._numbers = {_key(rows[number]): number for number in range(len(rows))}

    @property
    def _filter(self) -> PromptFilter:
        """Looked up each time: resuming replaces callbacks by restored ones."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, PromptFilter))

    def _filtered(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give groups of resting prompts other rows, in the batch of all processes."""
        everywhere = gather_object([self._numbers[_key(row)] for row in inputs])
        asked = everywhere[:: self.num_generations]
        seed = f"{self.args.seed}:{self.state.global_step}:{asked}"  # nothing that a resumed run would not know
        self._asked = self._filter.choose(asked, len(self.train_dataset), seed)
        changed = [old != new for old, new in zip(asked, self._asked, strict=True)]
        self._metrics["train"]["prompts/replaced"].append(sum(changed) / len(changed))
        start = self.accelerator.process_index * len(inputs)
        places = [(start + i) // self.num_generations for i in range(len(inputs))]
        return [
            self.train_dataset[self._asked[place]] if changed[place] else row
            for place, row in zip(places, inputs, strict=True)
        ]

    def _learn(self, rewards: Tensor) -> None:
        """Tell the filter of each prompt `(N / n)` whether its completions all earned one reward `(N,)`."""
        groups = rewards.view(-1, self.num_generations)
        spread = groups.nan_to_num(nan=-torch.inf).amax(1) - groups.nan_to_num(nan=torch.inf).amin(1)
        for row, equal in zip(self._asked, (spread <= 0).tolist(), strict=True):
            self._filter.learn(row, equal)

    # The choice form: a prompt is the number of its row, a completion the number of a choice. ----------------------

    def _generate(self, prompts: list) -> Any:
        if not self._choice_form:
            return super()._generate(prompts)
        device, mode = self.accelerator.device, self._mode
        numbers: dict[str, int] = {}
        rows: list[dict[str, Any]] = []
        for row in self._inputs:
            key = _key(row)
            if key not in numbers:
                numbers[key] = len(rows)
                rows.append(row)
        which = [numbers[_key(row)] for row in self._inputs]
        self._rows[mode] = rows
        with torch.no_grad():
            logps = self._policy(self.model, torch.arange(len(rows)), mode)[torch.tensor(which, device=device)]
        greedy = self.args.greedy_eval if mode == "eval" else self.args.greedy_rollouts
        picks = logps.argmax(-1) if greedy else torch.multinomial(logps.exp(), 1).squeeze(1)
        texts = [row["choices"][k] for row, k in zip(self._inputs, picks.tolist(), strict=True)]
        chat = not isinstance(self._inputs[0]["prompt"], str)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
        picked = self.accelerator.gather(logps.gather(1, picks[:, None]).exp().mean()).mean().item()
        if mode == "train" and not self._metrics[mode]["choices/probability"] and picked > SURE and not greedy:
            self._hint_at_temperature(picked)
        self._metrics[mode]["choices/probability"].append(picked)
        actions = [[k] for k in picks.tolist()]
        return [[i] for i in which], actions, None, completions, None, {}, None, []

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.use_vllm or self.is_fsdp_enabled else shared_prompts(self.model):
            return super()._generate_single_turn(*args, **kwargs)

    def _hint_at_temperature(self, picked: float) -> None:
        if self.state.global_step == 0 and self.accelerator.is_main_process:
            logger.warning(
                f"Before training the policy picks choices with a mean probability of {picked:.2f} at temperature="
                f"{self.temperature:g}: most samples of a row are equal and teach nothing. A higher temperature, such "
                "as 4, tries the others; what evaluation answers does not depend on it."
            )

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
            finite = logps.clamp(min=-1e4)  # absent choices: probability 0, and 0 * -1e4 = 0 where 0 * -inf is NaN
            entropies = -(finite.exp() * finite).sum(-1, keepdim=True) if kwargs.get("compute_entropy") else None
            return logps.gather(1, input_ids[:, 1:2]), entropies, None
        if not self._can_share(model, kwargs):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs
            )
        parts = []
        size = batch_size or len(input_ids)
        for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            prompts = distinct_prompts(ids[:, :-logits_to_keep], mask[:, :-logits_to_keep])
            if prompts is None:
                part = super()._get_per_token_logps_and_entropies(model, ids, mask, logits_to_keep, **kwargs)
                parts.append(part[:2])
                continue
            with self.accelerator.autocast():
                parts.append(
                    completion_logps(
                        model, prompts, ids[:, -logits_to_keep:], mask[:, -logits_to_keep:], self.temperature
                    )
                )
        logps, entropies = (
            torch.cat(column) if column[0] is not None else None for column in zip(*parts, strict=True)
        )
        return logps, entropies if kwargs.get("compute_entropy") else None, None

    def _can_share(self, model: Any, kwargs: Mapping[str, Any]) -> bool:
        """Whether the prompts of a batch can be read once: text alone, a cache, and as many forwards everywhere."""
        others = {name for name, value in kwargs.items() if value is not None} - {
            "compute_entropy",
            "compute_aux_loss",
        }
        return not (
            others
            or kwargs.get("compute_aux_loss")
            or self.is_fsdp_enabled
            or self.is_deepspeed_enabled
            or checkpoints_activations(model)
        ) and can_share(model)

    def _policy(self, model: Any, numbers: Tensor, mode: str) -> Tensor:
        """Log-probabilities `(rows, choices)` of the policy at `temperature` over the choices of the numbered rows."""
        rows = [self._rows[mode][number] for number in numbers.tolist()]
        with self.accelerator.autocast():
            logps = choice_logps(model, self.processing_class, rows)
        return (logps / self.temperature).log_softmax(-1)


def _key(row: Mapping[str, Any]) -> str:
    """What makes a row the same question: its prompt and its choices."""
    return json.dumps([row.get("prompt"), row.get("choices"), row.get("id")], default=str)  # images differ by id


def _columns(dataset: Any) -> Sequence[str]:
    """The columns of any dataset; a stream that does not know its own is asked for its first row."""
    if dataset is None:
        return ()
    return getattr(dataset, "column_names", None) or list(next(iter(dataset), {}))


@contextmanager
def _without_luspo_remark() -> Iterator[None]:
    """
    Drop TRL's advice to pair luspo with sequence-level ratios while the context is open.

    It speaks of clipping off policy. On policy the two have one gradient, and a KL penalty needs ratios per token.
    """

    def other(record: logging.LogRecord) -> bool:
        return "When using `'luspo'` loss, `importance_sampling_level`" not in record.getMessage()

    source = logging.getLogger(GRPOTrainer.__module__)
    source.addFilter(other)
    try:
        yield
    finally:
        source.removeFilter(other)


__all__ = [
    "PromptFilter",
    "ReinforceConfig",
    "ReinforceTrainer",
    "advantages_of",
]
