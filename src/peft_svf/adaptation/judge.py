# SPDX-License-Identifier: Apache-2.0
"""
A population of mixtures and solved examples -> scores, many of both in one forward or one `generate`.

[`Weights`] turns the vectors of a search into mixtures, [`Judge`] scores them on examples, and [`RayEvaluator`] shares
a population out to the workers of a Ray cluster. Nothing here knows how a search goes on.

    with RayEvaluator(partial(Transformer2Model.from_pretrained, "base", ["me/math", "me/code"]), workers=4) as shared:
        mixture = model.adapt(examples, evaluator=shared)
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..evaluation import choice_logps, complete
from ..experts.expert import OTHER, Mixture
from ..experts.library import ExpertLibrary
from ..files import extra
from ..rows import Row, prompt_text
from ..tasks import Task
from ..tuner.rows import active_rows
from ..tuner.targets import block_of
from .search import Judged


@dataclass(frozen=True)
class Weights:
    """Reads a vector as mixture weights: one per expert, or one per expert and block of the model."""

    names: tuple[str, ...]  # the experts
    blocks: tuple[str, ...] = ()  # such as "model.layers.0"; empty for the same weights in all
    normalize: bool = False  # Divide the weights of a block by their sum. Otherwise the base has what is left of 1.

    @property
    def size(self) -> int:
        """Length of the vector."""
        return len(self.names) * max(1, len(self.blocks))

    def alpha(self, vectors: Tensor) -> Tensor:
        """Read vectors `(members, size)` as weights `(members, blocks or 1, experts)`; gradients flow."""
        weights = vectors.view(len(vectors), -1, len(self.names))
        if not self.normalize:
            return weights
        total = weights.sum(-1, keepdim=True)
        return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), weights)

    def block(self, module: str) -> int:
        """Return the row of the weights that applies to a module."""
        return self.blocks.index(block_of(module)) if self.blocks else 0

    def corners(self) -> dict[str, list[float]]:
        """Return the base model, as `"other"`, and each expert as vectors."""
        one_hot = np.tile(np.eye(len(self.names)), max(1, len(self.blocks)))  # (experts, size)
        return {OTHER: [0.0] * self.size, **dict(zip(self.names, one_hot.tolist(), strict=True))}

    def mixture(self, vector: np.ndarray, provenance: dict[str, Any]) -> Mixture:
        """Convert a vector `(size,)` to a mixture; only valid without blocks."""
        (row,) = self.alpha(torch.tensor(vector, dtype=torch.float64)[None])[0].tolist()
        return Mixture(dict(zip(self.names, row, strict=True)), "few-shot", 1.0, {}, provenance)


@dataclass(eq=False)
class Judge:
    """
    Score vectors on examples.

    `{"prompt", "choices", "label"}`: the share of right choices, then the mean log-probability of the right ones at a
    temperature. `{"prompt", "answer"}`: with a task the mean score of greedy completions, then the mean log-likelihood
    of the answers; without one the latter alone. Every member sees the same examples, and sampled completions the same
    random numbers.

    A population shares a forward, each row under its own mixture. That is 3.6 times as fast as one member after the
    other for completions, but only 1.2 times for choices (SmolLM2-135M, two cores).

    With `gradients` the log-likelihood is differentiated too: `z` is linear in the weights, so one backward is enough.
    `temperature` divides the log-likelihoods of choices before they become probabilities.
    """

    library: ExpertLibrary
    tokenizer: PreTrainedTokenizerBase
    weights: Weights
    examples: Sequence[Row]
    task: Task | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 32  # rows per forward or `generate`; a row is one member on one example
    gradients: bool = False
    seed: int = 0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.choices = "choices" in self.examples[0]
        # Sorting makes examples of similar length share a batch.
        self.examples = sorted(self.examples, key=lambda example: len(str(example["prompt"])))
        self.rows = [answer_row(example) for example in self.examples]
        self._prompt_tokens = [self._count(prompt_text(self.tokenizer, row["prompt"])) for row in self.rows]
        answers = sum(self._count(text) for row in self.rows for text in row["choices"])
        self._tokens = sum(self._prompt_tokens) + answers

    @property
    def settings(self) -> dict[str, Any]:
        """All arguments but library and tokenizer, for the same judge in another process."""
        return {part.name: getattr(self, part.name) for part in fields(self)[2:]}

    def __call__(self, members: np.ndarray) -> Judged:
        """Score a population `(members, size)`."""
        begin = time.perf_counter()
        right, logp, gradients = self._likelihoods(members)
        tokens = self._tokens * len(members)
        if self.task is not None and not self.choices:
            right, more = self._completions(members, self.task)
            tokens += more
        logp = np.where(np.isnan(logp), -np.inf, logp)  # An overflow is the worst.
        return Judged(np.stack([right, logp], -1), gradients, tokens, time.perf_counter() - begin)

    def _likelihoods(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Score the right choice: whether it is the likeliest, its log-probability, and the gradients of the mean."""
        vectors = torch.tensor(members, dtype=torch.float64, requires_grad=self.gradients)
        slopes = torch.zeros_like(vectors)
        right, logp = np.zeros((2, len(members), len(self.rows)))
        for places, examples in self._blocks(len(members), self.batch_size):
            rows = [self.rows[e] for e in examples]
            with torch.set_grad_enabled(self.gradients), self._rowwise(vectors, places) as model:
                logps = choice_logps(model, self.tokenizer, rows, len(places))  # (members * examples, choices)
                logps = (logps / self.temperature).log_softmax(-1) if self.choices else logps
                labels = torch.tensor([row["label"] for row in rows] * len(places), device=logps.device)
                chosen = logps.gather(1, labels[:, None]).squeeze(1)
                if self.gradients:
                    slopes += torch.autograd.grad(chosen.sum() / len(self.rows), vectors)[0]
            block = np.ix_(places, examples)
            logp[block] = chosen.detach().cpu().view(len(places), -1).numpy()
            best = logps.detach().max(-1).values == chosen
            right[block] = best.cpu().view(len(places), -1).numpy() if self.choices else 0
        return right, logp, slopes.numpy() if self.gradients else None

    def _completions(self, members: np.ndarray, task: Task) -> tuple[np.ndarray, int]:
        """Score the completion of each member for each example `(members, examples)`; count the tokens."""
        vectors, tokens = torch.tensor(members, dtype=torch.float64), sum(self._prompt_tokens) * len(members)
        scores = np.zeros((len(members), len(self.rows)))
        device = next(self.library.model.parameters()).device
        # Rows draw in turn, so with sampling each member has the batches to itself.
        for places, examples in self._blocks(len(members), 1 if self.generation.get("do_sample") else self.batch_size):
            rows = [self.examples[e] for e in examples] * len(places)
            with (
                torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
                torch.no_grad(),
                self._rowwise(vectors, places) as model,
            ):
                torch.manual_seed(self.seed)
                texts = complete(model, self.tokenizer, [row["prompt"] for row in rows], **self.generation)
            grades = [task.grade(text, row) for text, row in zip(texts, rows, strict=True)]
            scores[np.ix_(places, examples)] = np.reshape(grades, (len(places), -1))
            tokens += sum(map(self._count, texts))
        return scores, tokens

    def _blocks(self, members: int, most: int) -> Iterator[tuple[range, range]]:
        """Yield members, at most so many, and examples that share a batch: many members, few examples."""
        together = min(members, most)
        count = self.batch_size // together  # examples
        for first in range(0, members, together):
            for start in range(0, len(self.rows), count):
                yield range(members)[first : first + together], range(len(self.rows))[start : start + count]

    @contextmanager
    def _rowwise(self, vectors: Tensor, places: range) -> Iterator[PeftModel]:
        """Give part i of the rows the mixture of `vectors[places[i]]`; gradients flow to it."""
        weights = self.weights.alpha(vectors)[list(places)]  # (rows, blocks or 1, experts)
        with self.library.activate(Mixture()) as model:
            offsets = self.library.mix(self.weights.names, lambda module: weights[:, self.weights.block(module)])
            with active_rows(self.library.layers(), offsets):
                yield model

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)


def block_effects(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    mixture: Mixture,
    examples: Sequence[Row],
    batch_size: int = 32,
) -> dict[str, np.ndarray]:
    """
    Measure how much likelier a mixture makes right answers than if z were 1 in one of its blocks.

    Blocks work together, so their effects don't add up to the effect of all.

    Returns:
        For `"all"` and for each block `(examples,)`, the difference in log-likelihood, or in log-probability of the
        right choice.
    """
    names, alpha = tuple(mixture.alpha), list(mixture.alpha.values())
    order = list(dict.fromkeys(map(block_of, library.layers())))  # in the model's order: files sort 10 before 9
    moved = {block_of(module) for name in names for module in library.expert(name).sizes}
    blocks = (*(block for block in order if block in moved), *sorted(moved.difference(order)))
    kept = np.stack([np.ones(len(blocks)), np.zeros(len(blocks)), *(1 - np.eye(len(blocks)))])
    members = np.einsum("mb,e->mbe", kept, alpha).reshape(len(kept), -1)  # (2 + blocks, blocks * experts)
    judge = Judge(library, tokenizer, Weights(names, blocks), examples, batch_size=batch_size)
    logps = judge(members).by_example[..., 1]  # (2 + blocks, examples)
    return dict(zip(("all", *blocks), logps[0] - logps[1:], strict=True))


Evaluator = Callable[[Judge, np.ndarray], Judged]  # scores a population, here or elsewhere, with the same result


def answer_row(example: Row) -> Row:
    """Write an example as a row with choices: its answer becomes the only one."""
    return example if "choices" in example else {**example, "choices": [str(example["answer"])], "label": 0}


class RayEvaluator(AbstractContextManager):
    """
    Share a population out to the workers of a Ray cluster (extra `ray`), on this machine or many.

    Each worker builds the model once, at its first population, and scores its share of every population; the scores
    equal those of this process up to the rounding of batched products. An exception in a worker is raised here.
    `close`, or the end of the `with` block, ends the workers. Ray starts by itself if `ray.init` hasn't been called.

    Args:
        factory (`Callable`):
            Picklable; returns an object with a `library` and a `tokenizer`, such as `functools.partial(
            Transformer2Model.from_pretrained, "base", ["me/math", "me/code"])`. Its experts must be the caller's.
        workers (`int`): Number of workers.
        options: Of each Ray actor, such as `num_gpus=1`; by default each has one CPU, and torch as many threads.
    """

    def __init__(self, factory: Callable[[], Any], workers: int = 2, **options: Any) -> None:
        with extra("ray", "RayEvaluator needs the library ray"):
            import ray
        self._ray = ray
        actor = ray.remote(**{"num_cpus": 1, **options})(_Worker)
        self._workers = [actor.remote(factory) for _ in range(workers)]

    def __call__(self, judge: Judge, members: np.ndarray) -> Judged:
        recipe = self._ray.put((judge.settings, digest_of_experts(judge.library)))
        shares = [share for share in np.array_split(members, len(self._workers)) if len(share)]
        # A population may have fewer members than there are workers.
        jobs = [worker.score.remote(recipe, share) for worker, share in zip(self._workers, shares, strict=False)]
        parts = self._ray.get(jobs)
        return Judged(
            np.concatenate([part.by_example for part in parts]),
            np.concatenate([part.gradients for part in parts]) if judge.gradients else None,
            sum(part.tokens for part in parts),
            max(part.seconds for part in parts),
        )

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; Ray itself goes on."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers = []


class _Worker:
    """A model in a process of its own, and judges on it."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self._factory, self._model = factory, None

    def score(self, recipe: tuple[dict[str, Any], dict[str, str]], members: np.ndarray) -> Judged:
        self._model = model = self._model or self._factory()  # (errors of __init__ would be wrapped)
        settings, digests = recipe
        mine = digest_of_experts(model.library)
        if differing := [name for name, digest in digests.items() if mine.get(name) != digest]:
            raise ValueError(
                f"The expert {differing[0]!r} of the search differs in a worker, which has {', '.join(mine)}: give "
                "its factory the same experts under the same names."
            )
        return Judge(model.library, model.tokenizer, **settings)(np.array(members))  # Ray's arrays are read-only


def digest_of_experts(library: ExpertLibrary) -> dict[str, str]:
    """Hash the offsets of each expert."""
    digests = {}
    for name in library.names:
        content = hashlib.sha256()
        for module, offset in sorted(library.expert(name).offsets.items()):
            content.update(module.encode() + offset.float().cpu().numpy().tobytes())
        digests[name] = content.hexdigest()
    return digests
