# SPDX-License-Identifier: Apache-2.0
"""
A penalty that keeps what an expert isn't trained on: KL(base ‖ policy) on the base's own answers to other requests.

    loss + retention * KL, where KL = mean over the answers' tokens of sum_v p_base(v) (log p_base(v) - log p(v))

[`Retaining`] is a mixin for trainers with a gradient. Nothing here knows a task or a reward.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..evaluation import base_answers
from ..evaluation.reading import evaluating
from ..rows import Prompt, prompt_ids, tokenizer_of
from ..tasks import everyday_requests
from .run import Run, RunConfig

PROMPTS, TOKENS = 64, 24  # requests that the base answers once, and tokens of an answer


@dataclass
class RetentionConfig(RunConfig):
    """
    Extend [`RunConfig`] by a penalty for moving away from the base, for trainers with a gradient.

    Args:
        retention (`float`):
            Weight of KL(base ‖ policy) per token of the base's own answers to everyday requests; 0 is off.
        retention_rows (`int`):
            How many of these answers each process takes in a step.
    """

    retention: float = 0.0
    retention_rows: int = 8

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        yield from super().rules()
        yield "retention", 0 <= self.retention < float("inf"), "0 or more"
        yield "retention_rows", self.retention_rows >= 1, "1 or more"


class BaseAnswers(TrainerCallback, ExportableState):
    """Holds the base's answers. A callback, because transformers keeps the state of callbacks in its checkpoints."""

    def __init__(self) -> None:
        self.pairs: list[list[Any]] = []  # a prompt and its answer

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"pairs": self.pairs}}


class Retaining(Run):
    """A [`Run`] whose loss has the penalty of [`RetentionConfig`], if `retention` is above 0."""

    retained_prompts: Sequence[Prompt] | None = None  # set before training; default everyday requests
    _retained: list[tuple[list[int], list[int]]] | None = None  # tokens of prompts and answers

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as [`Run.train`] does."""
        self._retained = None
        return super().train(*args, **kwargs)

    def ready(self) -> None:
        super().ready()
        if self.args.retention:
            if self.is_fsdp_enabled:
                raise ValueError("The base answers with whole weights: under FSDP set retention=0, or use DDP.")
            self.add_callback(BaseAnswers())

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Add the penalty to the loss of a step's last micro-batch."""
        if not (self.args.retention and self.model.training and self.accelerator.sync_gradients):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._retained is None:
            self._retained = self._read_answers()
        penalty = self.args.retention * self._divergence(self._retained)
        if not (self.loss_is_scaled_for_ga or self.compute_loss_func or num_items_in_batch is not None):
            penalty = penalty * self.current_gradient_accumulation_steps  # by which the loss is going to be divided
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch) + penalty

    def _read_answers(self) -> list[tuple[list[int], list[int]]]:
        """Encode the base's answers; it writes them if no checkpoint has them. A resumed run looks up its callback."""
        holder = next(c for c in self.callback_handler.callbacks if isinstance(c, BaseAnswers))
        if not holder.pairs:
            holder.pairs = broadcast_object_list([self._write_answers()])[0]  # the first process's answers
        prompts, answers = zip(*holder.pairs, strict=True)
        reader, encode = self.processing_class, tokenizer_of(self.processing_class)
        encoded = (encode(text, add_special_tokens=False).input_ids for text in answers)
        return list(zip(prompt_ids(reader, prompts), encoded, strict=True))

    def _write_answers(self) -> list[list[Any]]:
        prompts = everyday_requests("train", PROMPTS) if self.retained_prompts is None else self.retained_prompts
        with evaluating(self.model), self.model.disable_adapter():
            rows = base_answers(self.model, self.processing_class, prompts, TOKENS)
        return [[row["prompt"], *row["choices"]] for row in rows]

    def _divergence(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """Compute this process's part of KL(base ‖ policy), times the processes, over which DDP takes the mean."""
        rows, processes = self.args.retention_rows, self.accelerator.num_processes
        start = self.state.global_step * rows * processes
        step = [pairs[number % len(pairs)] for number in range(start, start + rows * processes)]
        first = self.accelerator.process_index * rows
        ids, mask, answered = (part.to(self.accelerator.device) for part in padded(step[first : first + rows]))

        def logps() -> Tensor:
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return logits[answered].float().log_softmax(-1)  # (tokens, vocabulary)

        with torch.no_grad(), self.model.disable_adapter():
            base = logps()
        total = F.kl_div(logps(), base, log_target=True, reduction="sum")
        part = total / sum(len(answer) for _, answer in step)
        self._metrics["train"]["retention"].append(self.accelerator.reduce(part.detach()).item())
        return part * processes


def padded(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """
    Join prompts and answers.

    Returns:
        Tokens `(N, T)`, their mask, and where the next token is one of the answer's; all padding is on the right.
    """
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.tensor([prompt + answer + [0] * (length - len(prompt) - len(answer)) for prompt, answer in pairs])
    starts = torch.tensor([[len(prompt)] for prompt, _ in pairs])
    ends = starts + torch.tensor([[len(answer)] for _, answer in pairs])
    places = torch.arange(length)
    return ids, (places < ends).long(), (places >= starts - 1) & (places < ends - 1)
