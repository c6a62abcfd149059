# SPDX-License-Identifier: Apache-2.0
"""
Model, task rows and reward -> a trained z-vector expert, by REINFORCE (arXiv 2501.06252, section 3.2).

A thin subclass of TRL's `GRPOTrainer`: data, generation, logging, checkpoints and resuming are TRL's. What is ours:
the estimators of the advantage, generation on merged weights, greedy evaluation, and rows of the choice form, whose
action is one of the row's `choices` and whose policy is the softmax of their summed token log-likelihoods. Private
names of TRL were read in 1.16.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import EarlyStoppingCallback, GenerationConfig

from .evaluation import choice_logps

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError("Training needs TRL and datasets: pip install 'peft-svf[train]'") from error

Estimator = Literal["none", "batch", "batch_norm", "rloo", "group"]


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
        greedy_rollouts (`bool`):
            Roll out the likeliest completion instead of a sample, as the reference code does (biased; one completion
            per prompt).
        greedy_eval (`bool`):
            Evaluate on the likeliest completion or choice.
        merge_for_generation (`bool`):
            Fold z into the weights while completions are generated, which makes a rollout cheaper.
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
    advantage_estimator: Estimator = field(default="rloo", metadata={"help": "How rewards become advantages."})
    reward_clip: float | None = field(default=None, metadata={"help": "Clip rewards to [-x, x]."})
    kl_direction: Literal["policy_ref", "ref_policy"] = field(default="policy_ref", metadata={"help": "Which KL."})
    greedy_rollouts: bool = field(default=False, metadata={"help": "Roll out the likeliest completion."})
    greedy_eval: bool = field(default=True, metadata={"help": "Evaluate on the likeliest completion."})
    merge_for_generation: bool = field(default=True, metadata={"help": "Generate on merged weights."})
    early_stopping_patience: int | None = field(default=None, metadata={"help": "Evaluations without a better one."})

    def __post_init__(self) -> None:
        single = self.num_generations == 1
        if self.advantage_estimator not in ("none", "batch", "batch_norm", "rloo", "group"):
            raise ValueError(f"`advantage_estimator` cannot be {self.advantage_estimator!r}.")
        if single and self.advantage_estimator in ("rloo", "group"):
            raise ValueError(
                f"advantage_estimator={self.advantage_estimator!r} compares the completions of a prompt, but "
                "num_generations is 1: use 'none' or 'batch', or 2 generations and more."
            )
        if self.greedy_rollouts and not single:
            raise ValueError(f"greedy_rollouts gives {self.num_generations} equal completions: set num_generations=1.")
        if self.beta and self.importance_sampling_level != "token":
            raise ValueError("With beta > 0 only importance_sampling_level='token' penalises a KL divergence.")
        if self.kl_direction not in ("policy_ref", "ref_policy"):
            raise ValueError(f"`kl_direction` must be 'policy_ref' or 'ref_policy', got {self.kl_direction!r}.")
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError("early_stopping_patience counts evaluations: set eval_strategy to 'steps' or 'epoch'.")
        self.use_bias_correction_kl = self.kl_direction == "policy_ref"
        if self.greedy_rollouts:
            greedy = {"temperature": 0.0} if self.use_vllm else {"do_sample": False}
            self.generation_kwargs: dict[str, Any] = {**(self.generation_kwargs or {}), **greedy}
            self.vllm_importance_sampling_correction = False  # a greedy token has log-probability 0 there
        if single:  # GRPO's checks want groups; one that is the whole batch passes them
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            self.num_generations = self.generation_batch_size or self.per_device_train_batch_size * steps
            if self.num_generations == 1:
                raise ValueError(
                    "A generation batch of 1 has no gradient to speak of: raise per_device_train_batch_size."
                )
        super().__post_init__()
        if single:
            self.num_generations = 1

    @classmethod
    def paper(cls, **kwargs: Any) -> "ReinforceConfig":
        """The text of arXiv 2501.06252: one sampled completion a prompt, the reward itself, KL to the base."""
        return cls(**{"num_generations": 1, "advantage_estimator": "none", "beta": 0.1, **kwargs})


class MergedGenerationMixin:
    """For any TRL trainer that rolls out: completions are generated on merged weights, which are restored after."""

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        settings: Any = self.args  # type: ignore[attr-defined]
        wanted = getattr(settings, "merge_for_generation", True) and not settings.use_vllm  # TRL merges for vLLM
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # type: ignore[attr-defined]
        if not wanted or sharded or not isinstance(model, PeftModel):
            return super()._generate(*args, **kwargs)  # type: ignore[misc]
        with merged(model):
            return super()._generate(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def merged(model: PeftModel) -> Iterator[None]:
    """Fold the active adapters into the weights while the context is open, and restore these to the bit."""
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


class ReinforceTrainer(MergedGenerationMixin, GRPOTrainer):
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
    """

    def __init__(
        self, model: Any, reward_funcs: Any, args: ReinforceConfig, train_dataset: Any = None, **kwargs: Any
    ) -> None:
        self._choice_form = "choices" in (getattr(train_dataset, "column_names", None) or ())
        self._rows: dict[str, list[dict[str, Any]]] = defaultdict(list)  # of the batch at hand, by train and eval
        if self._choice_form:
            for name in {"gradient_checkpointing", "activation_checkpointing"} & set(vars(args)):
                setattr(args, name, False)  # the prompt's cache is shared by its choices
            args.mask_truncated_completions = False  # a choice is never cut off
            args.pad_to_multiple_of = None  # its number takes one place
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        prompts = args.generation_batch_size // args.num_generations
        if isinstance(self.train_dataset, Sized) and len(self.train_dataset) < prompts:
            raise ValueError(
                f"A step takes {prompts} different prompts, but the training data have {len(self.train_dataset)} "
                "rows: lower per_device_train_batch_size or raise num_generations."
            )
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()  # TRL makes them bfloat16 on quantised bases
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """
        Evaluate as `GRPOTrainer` does, on greedy completions unless `greedy_eval=False`.

        The state of the random generators is put back: training goes on as if there had been no evaluation.
        """
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._greedy() if self.args.greedy_eval else nullcontext():
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

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        if self.args.reward_clip is not None:
            rewards = rewards.clamp(-self.args.reward_clip, self.args.reward_clip)
        self._rewards = rewards  # (N over all processes, reward functions)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._inputs = inputs
        output = super()._generate_and_score_completions(inputs)
        weights = self.reward_weights.to(self._rewards.device)
        rewards = (self._rewards * weights).nansum(1)
        rewards[self._rewards.isnan().all(1)] = torch.nan
        mode, group = self._mode, self.num_generations if self._mode == "train" else self.num_generations_eval
        if mode == "train" and self.args.advantage_estimator != "group":
            advantages = advantages_of(rewards, self.args.advantage_estimator, group)
            start = self.accelerator.process_index * len(inputs)
            output["advantages"] = advantages[start : start + len(inputs)]
            logged = self._logs["advantages"]
            for index, value in enumerate(advantages.tolist(), start=len(logged) - len(advantages)):
                logged[index] = value
        if group == 1:
            self._metrics[mode].pop("frac_reward_zero_std", None)  # always 1 for a group of one
        if mode == "train":
            self._log_offsets()
        return output

    def _log_offsets(self) -> None:
        offsets = [p.detach() for n, p in self.model.named_parameters() if "svf_offset" in n and p.requires_grad]
        if offsets:
            flat = torch.cat([offset.flatten() for offset in offsets])
            self._metrics["train"]["z/mean_distance_from_1"].append(flat.abs().mean().item())
            self._metrics["train"]["z/max_distance_from_1"].append(flat.abs().max().item())

    # The choice form: a prompt is the number of its row, a completion the number of a choice. ----------------------

    def _generate(self, prompts: list) -> Any:
        if not self._choice_form:
            return super()._generate(prompts)
        device, mode = self.accelerator.device, self._mode
        numbers: dict[str, int] = {}
        rows: list[dict[str, Any]] = []
        for row in self._inputs:
            key = json.dumps([row["prompt"], row["choices"]])
            if key not in numbers:
                numbers[key] = len(rows)
                rows.append(row)
        which = [numbers[json.dumps([row["prompt"], row["choices"]])] for row in self._inputs]
        self._rows[mode] = rows
        with torch.no_grad():
            logps = self._policy(self.model, torch.arange(len(rows)), mode)[torch.tensor(which, device=device)]
        greedy = self.args.greedy_eval if mode == "eval" else self.args.greedy_rollouts
        picks = logps.argmax(-1) if greedy else torch.multinomial(logps.exp(), 1).squeeze(1)
        texts = [row["choices"][k] for row, k in zip(self._inputs, picks.tolist(), strict=True)]
        chat = not isinstance(self._inputs[0]["prompt"], str)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
        picked = logps.gather(1, picks[:, None]).exp().mean()
        self._metrics[mode]["choices/probability"].append(self.accelerator.gather(picked).mean().item())
        actions = [[k] for k in picks.tolist()]
        return [[i] for i in which], actions, None, completions, None, {}, None, []

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not self._choice_form:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        numbers, places = torch.unique(input_ids[:, 0], return_inverse=True)
        logps = self._policy(model, numbers, self._mode)[places]  # (B, K)
        finite = logps.clamp(min=-1e4)  # absent choices: probability 0, and 0 * -1e4 = 0 where 0 * -inf is NaN
        entropies = -(finite.exp() * finite).sum(-1, keepdim=True) if kwargs.get("compute_entropy") else None
        return logps.gather(1, input_ids[:, 1:2]), entropies, None

    def _policy(self, model: Any, numbers: Tensor, mode: str) -> Tensor:
        """Log-probabilities `(rows, choices)` of the policy at `temperature` over the choices of the numbered rows."""
        rows = [self._rows[mode][number] for number in numbers.tolist()]
        with self.accelerator.autocast():
            logps = choice_logps(model, self.processing_class, rows)
        return (logps / self.temperature).log_softmax(-1)


__all__ = ["MergedGenerationMixin", "ReinforceConfig", "ReinforceTrainer", "advantages_of", "merged"]
