# SPDX-License-Identifier: Apache-2.0
"""
Model, task rows and reward -> a trained z-vector expert, without a gradient: evolution strategies on z.

Each step draws directions, moves z by `sigma` along each and against it, scores the rows under all of these members,
and lets an optimizer follow the estimate. z is small enough for it: arXiv 2507.04453 evolves singular values of
adapters on quantised bases, arXiv 2509.24372 whole models. Only forward passes are made, many members in one batch,
so rewards may be black boxes and bases quantised. Data, optimizer, schedule, logs, checkpoints and resuming are those
of `transformers.Trainer`; TRL isn't needed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..evaluation import choice_logps
from ..rows import Row
from ..tuner.config import SVFConfig
from ..tuner.layer import SVFLayer, svf_layers
from ..tuner.rows import active_rows
from .run import Graded, RunConfig, check_prompts, z_statistics

Reward = Callable[..., Sequence[float | None]]
Shaping = Literal["rank", "z_score", "none"]


def shaped(fitness: Tensor, shaping: Shaping) -> Tensor:
    """
    Turn the fitness of a population, `(members,)`, into the weights of its members.

    `"rank"`: ranks, evenly from -0.5 to 0.5, ties sharing their mean, so that outliers don't count for more.
    `"z_score"`: zero mean, unit deviation (arXiv 2509.24372). `"none"`: the fitness itself. The first two are all 0 if
    all members are equal.
    """
    if shaping == "none":
        return fitness
    if shaping == "z_score":
        centred = fitness - fitness.mean()
        return centred / centred.square().mean().sqrt().clamp(min=1e-8)
    _, places, counts = fitness.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(fitness)
    ranks = (last - (counts + 1) / 2)[places]  # counts from 0; ties have their mean rank
    return ranks / (len(fitness) - 1) - 0.5


def estimate(noise: Tensor, above: Tensor, below: Tensor, sigma: float) -> Tensor:
    """
    Estimate the gradient of the fitness `(D,)` from antithetic pairs.

    `1 / (2 P sigma) Σ (f(z + sigma e) - f(z - sigma e)) e` over `P` directions `e`. Its expectation over standard
    normal `e` is the gradient of a linear fitness, and of any fitness smoothed by `sigma`. Even terms cancel.

    Args:
        noise (`torch.Tensor` of shape `(P, D)`): The directions `e`.
        above, below (`torch.Tensor` of shape `(P,)`): Fitness of the members on their two sides.
        sigma (`float`): Standard deviation of the members, in units of z.
    """
    return (above - below) @ noise / (2 * len(noise) * sigma)


@dataclass
class EvolutionConfig(RunConfig, TrainingArguments):
    """
    `transformers.TrainingArguments` for evolution strategies on z-vectors, with the settings of [`RunConfig`].

    A step scores `per_device_train_batch_size` rows under every member of the population; several processes draw
    different rows and directions, and average their estimates. The defaults are not tuned on a real model: `sigma`
    moves a weight by about 5 % of its norm, as 0.001 does in arXiv 2509.24372 on whole weights.

    Args:
        population (`int`): Members of a step, an even number: two for each direction.
        sigma (`float`): Standard deviation of the members around the mean, in units of z.
        shaping (`str`): How fitness becomes weights, see [`shaped`].
        rows_per_forward (`int`): Rows times members in one forward pass or call of `generate`.
        max_completion_length (`int`): Tokens that a completion may have; rows with `choices` need none.
        reward_weights (`list[float]`, *optional*): One per reward function; default 1 each.
    """

    measured = "(.+_)?reward"
    learning_rate: float = 5e-3
    max_grad_norm: float = 0.0
    remove_unused_columns: bool = False
    population: int = 32
    sigma: float = 0.05
    shaping: Shaping = "rank"
    rows_per_forward: int = 256
    max_completion_length: int = 256
    reward_weights: list[float] | None = None

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        yield from super().rules()
        even = self.population > 0 and self.population % 2 == 0
        yield "population", even, "even, as members come in pairs"
        yield "sigma", self.sigma > 0, "above 0"
        yield "shaping", self.shaping in get_args(Shaping), f"one of {get_args(Shaping)}"
        yield "fp16", not self.fp16, "off, as it scales gradients; load the base in float16 instead"

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()


class EvolutionTrainer(Graded):
    """
    Train z-vectors by evolution strategies.

    The fitness of a member on a row with `choices` is its expected reward, `Σ p(choice) r(choice)`; on any other row
    the reward of its greedy completion. Evaluation takes the likeliest choice or the greedy completion.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The base with `peft_config`, or a model whose active adapter is to be trained.
        reward_funcs (`Callable` or `list`):
            As for `ReinforceTrainer`, without its reward models. `None` counts as 0.
        train_dataset, eval_dataset (sequence of rows, such as a list or a `datasets.Dataset`):
            Rows with `prompt`, and with `choices` for the choice form. Other columns go to the reward.
        kwargs:
            Everything else that `Trainer` takes.

    Raises:
        `ValueError`: if anything but z is trainable, if adapters are merged or disabled, or under FSDP.
    """

    objective = "evolution strategies"

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reward_funcs: Reward | Sequence[Reward],
        args: EvolutionConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        processing_class: PreTrainedTokenizerBase,
        peft_config: SVFConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self.grade_by(reward_funcs, args.reward_weights)
        self.check_adapter(model, args, peft_config)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        self._layers = _trained_layers(model)
        self._logged: dict[str, list[float]] = defaultdict(list)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=list,
            **kwargs,
        )
        if self.is_fsdp_enabled:
            raise ValueError("EvolutionTrainer moves whole z-vectors and doesn't run under FSDP: use DDP.")
        check_prompts(self.model, processing_class, train_dataset)
        self.ready()

    def training_step(self, model: Any, inputs: list[Row], num_items_in_batch: Any = None) -> Tensor:
        """Add the estimate of one batch of rows to the offsets' `.grad`; return minus the mean fitness."""
        self.model.eval()  # no dropout: members differ by their z alone
        weights = self._weights()
        z = torch.cat([weight.detach() for weight in weights])  # (D,)
        noise = self._draw(z)  # (P, D)
        members = torch.cat([z + self.args.sigma * noise, z - self.args.sigma * noise])
        fitness = self._fitness(members, inputs)
        finite = fitness[fitness.isfinite()]  # a member that overflows is the worst
        fitness = torch.where(fitness.isfinite(), fitness, finite.min() if len(finite) else 0.0)
        self.dead_reason = (
            f"All {len(fitness)} members earned the same, {fitness[0]:.3g}, so no direction is better: raise sigma or "
            "per_device_train_batch_size, or take rows that the model solves sometimes."
        )
        above, below = shaped(fitness, self.args.shaping).chunk(2)
        gradient = self.accelerator.reduce(estimate(noise, above, below, self.args.sigma), reduction="mean")
        share = -gradient / self.current_gradient_accumulation_steps  # optimizers descend
        for weight, part in zip(weights, share.split([len(weight) for weight in weights]), strict=True):
            weight.grad = part.clone() if weight.grad is None else weight.grad + part
        deviation = fitness.std(correction=0)
        for name, value in {"reward": fitness.mean(), "reward_std": deviation, "reward_best": fitness.max()}.items():
            self._logged[name].append(self.accelerator.gather(value).mean().item())
        return -self.accelerator.reduce(fitness.mean(), reduction="mean") / self.current_gradient_accumulation_steps

    def _weights(self) -> list[Any]:
        """List the trained offsets `(k,)`, in the order of their layers."""
        return [layer.svf_offset[name].weight for layer, name in self._layers.items()]

    def _draw(self, z: Tensor) -> Tensor:
        """Draw directions `(population / 2, D)`; their seed differs by process, and checkpoints keep its generator."""
        seed = int(torch.randint(2**62, ())) + self.accelerator.process_index
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.args.population // 2, len(z), generator=generator).to(z.device)

    @torch.no_grad()
    def _fitness(self, members: Tensor, rows: Sequence[Row]) -> Tensor:
        """Average the rewards of the rows under each of the z-vectors `(members, D)`: `(members,)`."""
        together = max(1, self.args.rows_per_forward // len(rows))  # members in one forward
        totals = torch.zeros(len(members), device=members.device)
        for start in range(0, len(rows), self.args.rows_per_forward):
            part = rows[start : start + self.args.rows_per_forward]
            table = self._choice_rewards(part) if "choices" in part[0] else None
            for first in range(0, len(members), together):
                some = members[first : first + together]
                totals[first : first + together] += self._member_rewards(some, part, table).sum(1)
        return totals / len(rows)

    def _member_rewards(self, members: Tensor, rows: Sequence[Row], table: Tensor | None) -> Tensor:
        """
        Compute the rewards `(members, rows)` of greedy completions.

        With a `table` of the rewards of choices, `(rows, choices)`: those expected over the choices.
        """
        repeated = [*rows] * len(members)
        with self._as(members), self.compute_loss_context_manager():
            if table is None:
                texts = self.answers(repeated, len(members))
            else:
                logps = choice_logps(self.model, self.processing_class, rows, len(members))
                return (logps.softmax(-1).view(len(members), *table.shape) * table).sum(-1)
        return self.rewards(repeated, texts).view(len(members), len(rows))

    @contextmanager
    def _as(self, members: Tensor) -> Iterator[None]:
        """Give consecutive parts of each batch the z-vectors `(members, D)` while the context is open."""
        sizes = [len(weight) for weight in self._weights()]
        layers = {module: layer for module, layer in svf_layers(self.model).items() if layer in self._layers}
        offsets = {}
        for (module, layer), parts in zip(layers.items(), members.split(sizes, dim=1), strict=True):
            offsets[module] = torch.stack([layer.padded(part) for part in parts])
        with active_rows(layers, offsets, merge=True):
            yield

    def _choice_rewards(self, rows: Sequence[Row]) -> Tensor:
        """Compute the reward `(rows, choices)` of each choice; 0 beyond the choices of a row."""
        pairs = [(row, text) for row in rows for text in row["choices"]]
        rewards = self.rewards([row for row, _ in pairs], [text for _, text in pairs])
        parts = rewards.split([len(row["choices"]) for row in rows])
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the mean reward of the likeliest choices or greedy completions: `{"eval_reward": float}`."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, Mapping):
            parts = (self.evaluate(part, None, f"{metric_key_prefix}_{name}") for name, part in dataset.items())
            return {key: value for part in parts for key, value in part.items()}
        metrics = {f"{metric_key_prefix}_reward": self.greedy_reward(dataset)}
        self.log(dict(metrics))
        control: Any = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the population's rewards and the distance of z from 1 to what is logged while training."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._logged.items()}
            logs |= z_statistics(self.model)
            self._logged.clear()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Count nothing: rows aren't tensors yet."""
        return 0


def _trained_layers(model: Any) -> dict[SVFLayer, str]:
    """Find the layers whose z is trained, and the adapter of each; refuse anything else that is trainable."""
    layers: dict[SVFLayer, str] = {}
    ready = True
    for layer in svf_layers(model).values():
        active: Any = layer.active_adapters
        trained = [n for n in active if n in layer.svf_offset and layer.svf_offset[n].weight.requires_grad]
        ready &= not layer.merged and not layer.disable_adapters and len(trained) <= 1
        if trained:
            layers[layer] = trained[0]
    offsets = {id(layer.svf_offset[name].weight) for layer, name in layers.items()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in offsets]
    if not ready or not layers or others:
        raise ValueError(
            f"Evolution trains the z-vectors of one adapter, neither merged nor disabled, and nothing else; trainable "
            f"here: {len(layers)} z-vectors and {len(others)} other parameters {others[:1]}. Pass "
            "peft_config=SVFConfig(...) with a base model, or PeftModel.from_pretrained(..., is_trainable=True), and "
            "unmerge, enable and activate the one adapter."
        )
    return layers


__all__ = ["EvolutionConfig", "EvolutionTrainer", "estimate", "shaped"]
