# SPDX-License-Identifier: Apache-2.0
"""
Requests, each with a mixture -> tokens, by transformers' continuous batching with a z-vector per request.

Internals of transformers' serving and of its continuous batching are used here and in `app`, read in 5.23.0; a test
lists them.
"""

import asyncio
import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    CBStreamer,
    CBWorkerDeadError,
    GenerateManager,
    _StreamError,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from ...evaluation import context_of
from ...experts.expert import Mixture
from ...rows import Prompt
from ...tuner.layer import active_rows
from ...two_pass import Transformer2Model

PAGE = 256  # tokens of a block of the cache, transformers' default
KEPT = 256  # mixtures whose offsets are kept


@dataclass(frozen=True)
class Capacity:
    """What the batch may hold; `cache_tokens` of keys and values are allocated at the start."""

    cache_tokens: int = 16384
    batch_tokens: int = 512
    concurrent: int = 32
    new_tokens: int = 1024


@dataclass(eq=False)
class Request:
    """A request on its way, shared by gate, app and engine."""

    mixture: Mixture = field(default_factory=Mixture)
    offsets: dict[str, Tensor] = field(default_factory=dict)
    model: str = ""
    max_new_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    prompt_tokens: int = 0
    new_tokens: int = 0
    first: float | None = None  # time of the first token
    cancel: Callable[[], None] = field(default=lambda: None)


REQUEST: ContextVar[Request] = ContextVar("request")


@dataclass(eq=False)
class Job:
    """What transformers keeps with a request of the batch, and hands back in each step."""

    offsets: dict[str, Tensor]
    processors: LogitsProcessorList
    sample: bool
    generator: torch.Generator

    def __deepcopy__(self, memo: dict[int, Any]) -> "Job":
        return self  # transformers copies it when a request gives up its cache and starts again


class _Sampler(ContinuousBatchingLogitsProcessor):
    """Gives each request its own generation config: transformers knows one for the whole batch, here a greedy one."""

    supported_kwargs = {"job": Job}
    ignored_kwargs = ()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        self.states = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self.states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        for row, state in enumerate(self.states):
            job: Job = state.logit_processor_kwargs["job"]
            if job.processors:
                ids = torch.tensor([state.initial_tokens + state.generated_tokens], device=scores.device)
                scores[row] = job.processors(ids, scores[row, None])[0]
            if job.sample:  # the largest of scores with Gumbel noise is a draw from their softmax
                noise = torch.empty(scores.shape[1]).exponential_(generator=job.generator)
                scores[row] -= noise.log().to(scores.device)
        return scores


class _Batch(ContinuousBatchingManager):
    """Runs each step of the batch under the mixtures of its requests."""

    def __init__(self, model: Any, capacity: Capacity, step: Callable[[Any], Any]) -> None:
        config = copy.deepcopy(model.generation_config)
        config.do_sample = False
        settings = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=-(-capacity.cache_tokens // PAGE),
            max_batch_tokens=capacity.batch_tokens,
            max_requests_per_batch=capacity.concurrent,
            allow_block_sharing=False,  # keys and values of one mixture are wrong for another
            use_async_batching=False,  # prepares the next batch while this one runs, with one table of mixtures
            use_cuda_graph=False,  # would replay the mixtures of the step that was captured
            auto_switch_to_flash=model.dtype != torch.float32,
        )
        super().__init__(model, config, settings)
        self.step = step
        self.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_Sampler()]))
        self.logit_processor.tensors_required = 1
        # Outputs that nobody waits for, because a client has left, would pile up.
        self.output_router.output_queue = SimpleNamespace(put=lambda output: None)

    def _generation_step(self) -> None:
        with self.step(self.batch_processor.inputs_and_outputs.requests_in_batch):
            super()._generation_step()

    def forget(self, request_id: str) -> None:
        """Cancel a request: its slot is free in the next step."""
        self.cancel_request(request_id)
        self.output_router.result_handlers.pop(request_id, None)


class Stops(asyncio.Queue[Any]):
    """Text up to the first stop string; text that may be the beginning of one waits for more."""

    def __init__(self, stops: Sequence[str]) -> None:
        super().__init__()
        self.stops, self.waits, self.stopped = stops, "", False

    def put_nowait(self, item: Any) -> None:
        if type(item) is str:  # reasoning is a subclass
            text = "" if self.stopped else self.waits + item
            text, self.stopped = cut(text, self.stops) if text else ("", self.stopped)
            parts = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
            keep = len(text) - (0 if self.stopped else max(parts, default=0))
            item, self.waits = text[:keep], text[keep:]
            if not item:
                return
        elif self.waits:
            super().put_nowait(self.waits)
            self.waits = ""
        super().put_nowait(item)


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Cut a text at its first stop string; return it, and whether there was one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


class Engine(BaseGenerateManager):
    """
    Generates for the handlers of transformers' server, which see it as their one generation manager.

    Text models run in a continuous batch, models that see images one request at a time. Everything else that runs the
    model or changes its experts (first passes, `add`, `remove`) happens between two steps of the batch.

    Args:
        model ([`Transformer2Model`]): Base model with experts.
        capacity ([`Capacity`]): Limits of the batch.

    Raises:
        `ValueError`: if experts move weights that can't differ within a packed batch.
    """

    def __init__(self, model: Transformer2Model, capacity: Capacity = Capacity()) -> None:  # noqa: B008
        self.model, self.capacity = model, capacity
        self.context = context_of(model.library.model)
        self._arrived: SimpleQueue[tuple[Prompt, asyncio.Future[Mixture]]] = SimpleQueue()
        self._worker = ThreadPoolExecutor(1, "first-pass")
        self._mixed: dict[frozenset[tuple[str, float]], dict[str, Tensor]] = {}
        self._layers = model.library.layers()
        self._table: tuple[list[dict[str, Tensor]], dict[str, Tensor]] = ([], {})
        self._alone = GenerateManager()
        self.batch: _Batch | None = None
        if model.processor is None:
            self._check_layers()
            self.batch = _Batch(self.base, capacity, self._rows)
            self.batch.start()

    @property
    def base(self) -> Any:
        """The base model, with the layers of the experts."""
        return self.model.library.model.get_base_model()

    def is_alive(self) -> bool:
        """Whether requests can be answered; after a fatal error in a step the process has to be started again."""
        return self.batch is None or self.batch.background_thread_status.fatal_error is None

    def stop(self) -> None:
        """Finish what runs, for some seconds, and free the batch."""
        self._worker.shutdown(cancel_futures=True)
        if self.batch is not None:
            self.batch.stop(block=True, timeout=5)

    # --- the experts

    async def choose(self, prompt: Prompt) -> Mixture:
        """Run the first pass for a prompt, together with what else has arrived."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Mixture] = loop.create_future()
        self._arrived.put((prompt, future))
        await loop.run_in_executor(self._worker, self._choose_all, loop)
        return await future

    def _choose_all(self, loop: asyncio.AbstractEventLoop) -> None:
        arrived = []
        while True:
            try:
                arrived.append(self._arrived.get_nowait())
            except Empty:
                break
        for group in [arrived], [[entry] for entry in arrived]:  # one by one if together they fail
            try:
                results = [self.first_pass([prompt for prompt, _ in part]) for part in group if part]
            except Exception:
                continue
            for part, mixtures in zip(group, results, strict=False):
                for (_, future), mixture in zip(part, mixtures, strict=True):
                    loop.call_soon_threadsafe(_settle, future, mixture)
            return

    def first_pass(self, prompts: Sequence[Prompt]) -> list[Mixture]:
        """Choose the mixture of each prompt, between two steps of the batch."""
        with self.between_steps():
            return self.model.first_pass(prompts)

    def offsets(self, mixture: Mixture) -> dict[str, Tensor]:
        """Mix the offsets of each layer, `(1, k)`; a request keeps them, also if an expert is removed meanwhile."""
        key = frozenset(mixture.alpha.items())
        with self.model.library.lock:
            if key not in self._mixed:
                if len(self._mixed) >= KEPT:
                    self._mixed.pop(next(iter(self._mixed)))
                alpha = torch.tensor([list(mixture.alpha.values())])  # (1, experts)
                self._mixed[key] = self.model.library.mix(list(mixture.alpha), lambda _: alpha)
            return self._mixed[key]

    def add(self, source: Any, name: str | None = None) -> str:
        """Add an expert between two steps; return its name. Raises `ValueError` as the library does."""
        with self.between_steps():
            name = self.model.library.add(source, name)
            try:
                self._check_layers()
            except ValueError:
                self.model.library.remove(name)
                raise
            return name

    def remove(self, name: str) -> None:
        """Remove an expert; requests that run with it are answered. Raises `ValueError` as the library does."""
        with self.between_steps():
            self.model.library.remove(name)
            self._mixed.clear()

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Have the model for this thread alone: the batch pauses, and keeps its requests."""
        with self.batch.pause() if self.batch else nullcontext(), self.model.library.lock:
            yield

    def _check_layers(self) -> None:
        """Run one packed batch of two mixtures: a layer that can't serve it raises `ValueError`."""
        self._layers = self.model.library.layers()
        self._mixed.clear()
        if self.model.processor is not None:
            return
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.base.device)
        one = {name: torch.zeros(2, layer._basis().shape[-1]) for name, layer in self._layers.items()}
        last = {"logits_to_keep": torch.tensor([1], device=ids.device)} if self.base._supports_logits_to_keep() else {}
        with torch.no_grad(), self._packed(one, torch.tensor([0, 1])):
            self.base(input_ids=ids, use_cache=False, **last)

    @contextmanager
    def _packed(self, offsets: dict[str, Tensor], index: Tensor) -> Iterator[None]:
        execution = next(iter(self._layers.values())).execution
        with active_rows(self._layers, offsets, index):
            execution.batch = (1, len(index))
            try:
                yield
            finally:
                execution.batch = None

    @contextmanager
    def _rows(self, packed: Sequence[Any]) -> Iterator[None]:
        """Give the tokens of a step, request after request, the offsets of their requests."""
        jobs = [entry.state.logit_processor_kwargs["job"].offsets for entry in packed]
        different = list({id(offsets): offsets for offsets in jobs}.values())
        if different != self._table[0] if len(different) != len(self._table[0]) else any(
            a is not b for a, b in zip(different, self._table[0], strict=True)
        ):
            self._table = different, {name: _stack([d.get(name) for d in different]) for name in self._layers}
        places = {id(offsets): place for place, offsets in enumerate(different)}
        rows = torch.tensor([places[id(offsets)] for offsets in jobs])
        index = rows.repeat_interleave(torch.tensor([entry.query_length for entry in packed]))  # (tokens,)
        with self._packed(self._table[1], index):
            yield
