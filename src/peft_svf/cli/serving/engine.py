# SPDX-License-Identifier: Apache-2.0
"""
Requests, each with a mixture -> tokens, by transformers' continuous batching with a z-vector per request.

Internals of transformers' serving and of its continuous batching are used here and in `app`, read in 5.23.0.
"""

import asyncio
import copy
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from queue import SimpleQueue
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
from ...tuner.layer import SVFLayer
from ...tuner.rows import active_rows
from ...two_pass import Transformer2Model

PAGE = 256  # tokens of a block of the cache, transformers' default
KEPT = 64  # mixtures whose offsets are kept
MERGE_AT = 64  # steps in a row under one mixture, after which merging it into the weights pays


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
    tokens: Sequence[int] = ()  # written so far
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
    ids: Tensor  # (1, prompt + new tokens): the prompt and the answer so far

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
                length = len(state.initial_tokens) + len(state.generated_tokens)
                job.ids[0, length - 1] = (state.generated_tokens or state.initial_tokens)[-1]
                scores[row] = job.processors(job.ids[:, :length], scores[row, None])[0]
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
        self.batch_processor = self._create_batch_processor()  # here, so that a cache too large fails at once

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
            if self.stopped:
                return
            text = self.waits + item
            item = cut(text, self.stops)
            self.stopped = len(item) < len(text)
            if not self.stopped:
                parts = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
                item = text[: len(text) - max(parts, default=0)]
            self.waits = "" if self.stopped else text[len(item) :]
        elif self.waits:
            super().put_nowait(self.waits)
        if item != "":
            super().put_nowait(item)


def cut(text: str, stops: Sequence[str]) -> str:
    """Cut a text at its first stop string."""
    return text[: min([place for stop in stops if (place := text.find(stop)) >= 0], default=len(text))]


class Engine(BaseGenerateManager):
    """
    Generates for the handlers of transformers' server, which see it as their one generation manager.

    Text models run in a continuous batch, models that see images one request at a time. Everything else that runs the
    model or changes its experts (first passes, `add`, `remove`) happens between two steps of the batch. Experts that
    move weights which can't differ within a packed batch are refused by a `ValueError`.
    """

    def __init__(self, model: Transformer2Model, capacity: Capacity = Capacity()) -> None:
        self.model, self.capacity = model, capacity
        self.context = context_of(model.library.model)
        self._arrived: SimpleQueue[tuple[Prompt, Future[Mixture]]] = SimpleQueue()
        self._worker = ThreadPoolExecutor(1, "first-pass")
        self._mixed = lru_cache(KEPT)(self._mix)  # equal mixtures of a step share their offsets
        self._layers = model.library.layers()
        self._step: tuple[Any, ...] = ([],)  # the last one's requests with their numbers of tokens, and their rows
        self._alone = GenerateManager()
        self.batch: _Batch | None = None
        self.cache_bytes = 0
        if model.processor is None:
            self._check_layers()
            self.batch = _Batch(self.base, capacity, self._rows)
            self.cache_bytes = self.batch.batch_processor.cache.cache_tensor.nbytes
            self.batch.start()

    @property
    def base(self) -> Any:
        """The base model, with the layers of the experts."""
        return self.model.library.model.get_base_model()

    def is_alive(self) -> bool:
        """Whether requests can be answered; after a fatal error in a step the process has to be started again."""
        return self.batch is None or self.batch.background_thread_status.fatal_error is None

    def stop(self) -> None:
        """End all requests and free the batch."""
        self._worker.shutdown(cancel_futures=True)
        if self.batch is not None and self.batch.is_running():
            self.batch.stop(block=True, hard_stop=True)

    # --- the experts

    async def choose(self, prompt: Prompt) -> Mixture:
        """Run the first pass for a prompt, together with what else has arrived."""
        future: Future[Mixture] = Future()
        self._arrived.put((prompt, future))
        self._worker.submit(self._choose_all)
        return await asyncio.wrap_future(future)

    def _choose_all(self) -> None:
        arrived = []
        while not self._arrived.empty():  # only this thread takes from it
            prompt, future = self._arrived.get()
            if future.set_running_or_notify_cancel():  # else its client has left
                arrived.append((prompt, future))
        try:
            outcomes: Sequence[Any] = self.first_pass([prompt for prompt, _ in arrived]) if arrived else []
        except Exception:  # one that fails, fails alone
            outcomes = [self._outcome(prompt) for prompt, _ in arrived]
        for (_, future), outcome in zip(arrived, outcomes, strict=True):
            future.set_exception(outcome) if isinstance(outcome, Exception) else future.set_result(outcome)

    def _outcome(self, prompt: Prompt) -> Mixture | Exception:
        try:
            return self.first_pass([prompt])[0]
        except Exception as error:
            return error

    def first_pass(self, prompts: Sequence[Prompt]) -> list[Mixture]:
        """Choose the mixture of each prompt, between two steps of the batch."""
        with self.between_steps():
            return self.model.first_pass(prompts)

    def offsets(self, mixture: Mixture) -> dict[str, Tensor]:
        """Mix the offsets of each layer, `(1, k)`; a request keeps them, also if an expert is removed meanwhile."""
        with self.model.library.lock:
            return self._mixed(tuple(mixture.alpha.items()))

    def _mix(self, shares: tuple[tuple[str, float], ...]) -> dict[str, Tensor]:
        alpha = torch.tensor([[weight for _, weight in shares]])  # (1, experts)
        return self.model.library.mix([name for name, _ in shares], lambda _: alpha)

    def add(self, source: Any, name: str | None = None) -> str:
        """Add an expert between two steps; return its name."""
        with self.between_steps():
            name = self.model.library.add(source, name)
            try:
                self._check_layers()
            except Exception:
                self.model.library.remove(name)
                raise
            return name

    def remove(self, name: str) -> None:
        """Remove an expert; requests that run with it are answered."""
        with self.between_steps():
            self.model.library.remove(name)
            self._mixed.cache_clear()

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Have the model for this thread alone: the batch pauses, and keeps its requests."""
        with self.batch.pause() if self.batch else nullcontext(), self.model.library.lock:
            yield

    def _check_layers(self) -> None:
        """Run a packed batch of two mixtures, so that a layer that can't tell its tokens apart raises `ValueError`."""
        self._layers = self.model.library.layers()
        self._mixed.cache_clear()
        self._step = ([],)  # a new expert may move more directions of a weight
        if self.model.processor is not None:
            return
        names = self.model.library.names
        several = self.model.library.mix(names, lambda _: torch.tensor([[1e-3], [0.0]]).expand(2, len(names)))
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.base.device)
        last = {"logits_to_keep": torch.ones(1, dtype=torch.long, device=ids.device)}
        with torch.no_grad(), active_rows(self._layers, several, torch.tensor([0, 1])):
            self.base(input_ids=ids, use_cache=False, **(last if self.base._supports_logits_to_keep() else {}))

    @contextmanager
    def _rows(self, packed: Sequence[Any]) -> Iterator[None]:
        """Give the tokens of a step, request after request, the offsets of their requests."""
        offsets = [entry.state.logit_processor_kwargs["job"].offsets for entry in packed]
        step = [(id(part), entry.query_length) for part, entry in zip(offsets, packed, strict=True)]
        if step != self._step[0]:  # while all requests decode, a step is like the one before
            different = {id(part): part for part in offsets}
            rows = [(name, [part.get(name) for part in different.values()]) for name in self._layers]
            table = {name: _stack(self._layers[name], parts) for name, parts in rows}
            index = [list(different).index(part) for part, length in step for _ in range(length)]
            self._step = step, table, torch.tensor(index, device=self.base.device), offsets  # which keep their ids
        table, index = self._step[1:3]
        with active_rows(self._layers, table, index, MERGE_AT):
            yield

    # --- the requests

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], Any]:
        """Start to generate for the [`Request`] of this context: its text and a final `None` arrive in the queue."""
        request, batch = REQUEST.get(), self.batch
        self._fit(inputs, gen_config, request)
        if batch is None:
            answerer, inputs = self._answerer(request, inputs)
            return self._alone.generate_streaming(answerer, processor, inputs, gen_config, request_id, response_parser)
        job, eos = self._job(inputs["input_ids"], gen_config, request), gen_config.eos_token_id
        queue, loop = Stops(request.stop), asyncio.get_running_loop()
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        streamer = CBStreamer(batch, request_id, tokenizer, loop, queue, response_parser=response_parser)

        def receive(output: Any) -> None:
            if queue.stopped:
                return
            request.tokens, request.first = output.generated_tokens, request.first or time.perf_counter()
            streamer.put(output)
            if output.error is not None:
                queue.put_nowait(_StreamError(json.dumps(output.error)[1:-1]))  # transformers puts it into quotes
            if queue.stopped and not output.is_finished():
                request.cancel()
            if queue.stopped or output.is_finished():
                streamer.end()

        batch.register_result_handler(request_id, receive)  # first, since a short answer may be there at once
        request.cancel = lambda: batch.forget(request_id)
        call = (inputs["input_ids"], request_id, gen_config.max_new_tokens)
        if not (self.is_alive() and batch.add_request(*call, streaming=True, eos_token_id=eos, job=job)):
            request.cancel()
            raise CBWorkerDeadError("The server is stopping or has failed: ask another one.")
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, Sequence[int]]:
        """Generate for the [`Request`] of this context; return text, length of the prompt, and new tokens."""
        queue, _ = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        while (item := await queue.get()) is not None:
            if isinstance(item, _StreamError):
                raise RuntimeError(item.msg) if self.is_alive() else CBWorkerDeadError(item.msg)
        request = REQUEST.get()
        text = processor.decode(request.tokens, skip_special_tokens=True)
        return cut(text, request.stop), request.prompt_tokens, request.tokens

    def _fit(self, inputs: Any, config: GenerationConfig, request: Request) -> None:
        """Set how many tokens a request may add; a `ValueError` if it doesn't fit."""
        length, least = torch.as_tensor(inputs["input_ids"]).shape[-1], request.max_new_tokens or 1
        cache = self.capacity.cache_tokens
        most = min(self.capacity.new_tokens, min(self.context or cache, cache) - length)
        if most < least:
            raise ValueError(f"After a prompt of {length} tokens, an answer has at most {max(most, 0)}, not {least}.")
        config.max_new_tokens, request.prompt_tokens = request.max_new_tokens or most, length

    def _job(self, ids: list[int], config: GenerationConfig, request: Request) -> Job:
        room = torch.tensor([[*ids, *[0] * config.max_new_tokens]], device=self.base.device)
        processors = self.base._get_logits_processor(config, len(ids))
        if processors:  # what a request sets wrongly fails here, not in a step of all
            size = self.base.config.get_text_config().vocab_size
            processors(room[:, : len(ids)], torch.zeros(1, size, device=room.device))
        generator = torch.Generator()
        generator.manual_seed(request.seed % 2**63) if request.seed is not None else generator.seed()
        return Job(request.offsets, processors, bool(config.do_sample), generator, room)

    def _answerer(self, request: Request, inputs: Any) -> tuple[Any, dict[str, Any]]:
        """Stand in for the model if requests are answered one at a time: generate with the request's mixture."""
        cancelled = threading.Event()
        request.cancel = cancelled.set

        def generate(**kwargs: Any) -> None:
            if request.seed is not None:
                torch.manual_seed(request.seed % 2**63)
            self.model.answer([request.mixture], **kwargs)

        def follow(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            request.tokens = ids[0, request.prompt_tokens :].tolist()
            request.first = request.first or time.perf_counter()
            return torch.full((len(ids),), cancelled.is_set(), device=ids.device)

        return SimpleNamespace(generate=generate), {**inputs, "stopping_criteria": [follow]}


def _stack(layer: SVFLayer, parts: Sequence[Tensor | None]) -> Tensor:
    """Stack offsets of one layer, each `(1, k)` or nothing for the base: `(n, k)`, empty if none moves it."""
    like = next((part for part in parts if part is not None and part.numel()), None)
    if like is None:
        return torch.zeros(0)
    nothing = torch.zeros_like(like)
    given = [part if part is not None and part.numel() else nothing for part in parts]
    return torch.stack([layer.padded(part[0]) for part in given])
