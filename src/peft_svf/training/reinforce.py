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
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import GenerationConfig

from ..evaluation import choice_logps
from ..evaluation.reading import (
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
from .objective import PromptFilter, ReinforceConfig, advantages_of  # names the extra if TRL is missing
from .retention import Retaining
from .run import check_prompts, checked_reward, columns_of, z_statistics

from trl import GRPOTrainer  # isort: skip

logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """The state that the hooks of one rollout share."""

    inputs: list[dict[str, Any]]  # the row of each completion
    numbers: list[int] = field(default_factory=list)  # row numbers of all prompts, if a filter is on
    rows: list[dict[str, Any]] = field(default_factory=list)  # distinct rows of the choice form, by "prompt token"
    rewards: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # (N, functions), of all processes
    prompts: Prompts | None = None  # answers of one token: what was read, and the reading that they were drawn from
    read: Reading | None = None


class ReinforceTrainer(Retaining, GRPOTrainer):
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
        self._choice_form = "choices" in columns_of(train_dataset)
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
        if isinstance(tuner := getattr(self.model, "base_model", None), SVFModel):
            plan = tuner.peft_config[tuner.active_adapters[0]].plan
            tuner.set_plan(plan, forwards_per_step=args.gradient_accumulation_steps)
        self.ready()
        if args.prompt_filter:
            data = self.train_dataset
            data = data.select_columns([name for name in ("prompt", "choices", "id") if name in columns_of(data)])
            self._numbers = {_key(data[number]): number for number in range(len(data))}  # images stay unread
            self.add_callback(PromptFilter())

    names_sets = False  # TRL's metrics don't

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `GRPOTrainer` does, greedily unless `greedy_eval=False`; training then goes on unchanged."""
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
        """Find prompts, which TRL has shuffled, in the rollout that kept its graph; the graph is used once."""
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


@contextmanager
def _without_luspo_advice() -> Iterator[None]:
    """
    Drop TRL's advice to pair luspo with sequence-level ratios while the context is open.

    It concerns clipping off policy. On policy the two have one gradient, and a KL penalty needs ratios per token.
    """

    def other(record: logging.LogRecord) -> bool:
        return "When using `'luspo'` loss, `importance_sampling_level`" not in record.getMessage()

    source = logging.getLogger(GRPOTrainer.__module__)
    source.addFilter(other)
    try:
        yield
    finally:
        source.removeFilter(other)


__all__ = ["PromptFilter", "ReinforceConfig", "ReinforceTrainer", "advantages_of"]
