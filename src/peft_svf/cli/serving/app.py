# SPDX-License-Identifier: Apache-2.0
"""
A `Transformer2Model` -> OpenAI's API over HTTP: transformers' server and handlers, with a mixture for each request.

`model` names the base, an expert, a mixture, or `"auto"`, for which the first pass chooses; the fields `expert` and
`mixture` go before it. Answers carry the decision as `dispatch`.
"""

import asyncio
import inspect
import json
import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from jinja2 import TemplateError
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler, CBWorkerDeadError, GenerationState, Modality

from ...experts.expert import OTHER, Mixture
from ...rows import Prompt
from .engine import REQUEST, Engine
from .gate import ANSWERS, Gate, Metrics, Refused, Rules, bears, error_body

logger = logging.getLogger(__name__)
AUTO = "auto"
OURS = ("expert", "mixture")
LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
RANGES = {"temperature": (0, 2), "top_p": (1e-6, 1), "frequency_penalty": (-0.99, 2)}
# Fields that transformers would ignore although the answer should change, with the values that change nothing.
IGNORED: dict[str, Any] = {
    **dict.fromkeys(("audio", "background", "echo", "function_call", "functions", "logprobs", "max_tool_calls")),
    **dict.fromkeys(("prediction", "presence_penalty", "previous_response_id", "prompt", "top_logprobs")),
    "best_of": 1,
    "modalities": ["text"],
    "n": 1,
    "response_format": {"type": "text"},
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "truncation": "disabled",
    "web_search_options": None,
}
WRONG = (ArithmeticError, AttributeError, LookupError, TemplateError, TypeError, ValueError)  # in what a client sent


def build(engine: Engine, rules: Rules, folder: Path | None = None) -> Gate:
    """
    Build the ASGI application.

    Args:
        engine ([`Engine`]): It is stopped when the application ends.
        rules ([`Rules`]): Keys and limits.
        folder (`Path`, *optional*): Experts in it may be added by `POST /v1/experts`, by their folders' names.
    """
    models, metrics, library = _Models(engine), Metrics(), engine.model.library
    for name in library.names:
        models.check_name(name)
    handlers = [kind(models, _State(engine)) for kind in (_Chats, _Completions, _Responses)]
    app: FastAPI = build_server(models, *handlers, None, None, _State(engine))
    app.state.engine = engine
    # Not the routes that load and drop models for anyone who asks.
    app.router.routes[:] = [r for r in app.routes if getattr(r, "path", "") in (*ANSWERS, "/v1/models", "/health")]
    for kind in (Refused, HTTPException, RequestValidationError, CBWorkerDeadError, Exception):
        app.add_exception_handler(kind, _failure)

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> JSONResponse:
        return JSONResponse(models.find(name))

    @app.get("/metrics")
    def show_metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    async def change(request: HTTPRequest, work: Callable[[], Any]) -> JSONResponse:
        if not bears(request.scope, rules.admin_keys):
            raise Refused(403, "Experts are added and removed with an admin key.")
        try:
            await asyncio.to_thread(work)
        except (ValueError, OSError) as error:
            raise Refused(400, str(error)) from error
        return JSONResponse({"object": "list", "data": models.list_models()})

    @app.post("/v1/experts")
    async def add(request: HTTPRequest, body: dict[str, Any]) -> JSONResponse:
        source, name = body.get("source"), body.get("name") or body.get("source")

        def work() -> None:
            # looked up among names, so that none is ever joined to a path
            sources = {path.name: path for path in folder.iterdir() if path.is_dir()} if folder else {}
            if not isinstance(source, str) or source not in sources:
                raise ValueError(f"There is no expert {source!r} in the server's folder.")
            models.check_name(name)
            engine.add(sources[source], name)

        return await change(request, work)

    @app.delete("/v1/experts/{name:path}")
    async def remove(request: HTTPRequest, name: str) -> JSONResponse:
        return await change(request, lambda: engine.remove(name))

    return Gate(app, rules, metrics)


async def _failure(request: HTTPRequest, error: Any) -> JSONResponse:
    """Answer an error in OpenAI's form."""
    status, message, code = 500, "The server failed at this request.", getattr(error, "code", None)
    if isinstance(error, HTTPException):
        status, message = 400 if error.status_code == 422 else error.status_code, error.detail
    elif isinstance(error, RequestValidationError):
        status, message = 400, "The body isn't a JSON object."
    elif isinstance(error, (Refused, CBWorkerDeadError)):
        status, message = getattr(error, "status", 503), str(error)
    return JSONResponse(error_body(status, message, code), status)


class _Models(ModelManager):
    """Stands in for transformers' manager of many models: there is one, and its experts are listed."""

    def __init__(self, engine: Engine) -> None:  # the other one's would load a model
        self.engine, self.force_model = engine, None
        self.base_name = engine.base.name_or_path or "base"

    def list_models(self) -> list[dict[str, Any]]:
        """List what `model` may name (transformers 5.24)."""
        library = self.engine.model.library
        about = {AUTO: "chosen by the first pass", self.base_name: "the base model", **library.descriptions}
        about |= dict.fromkeys(library.mixtures, "a mixture")
        entry = {"object": "model", "created": 0, "owned_by": "peft-svf"}
        return [{"id": name, **entry, "description": text} for name, text in about.items()]

    get_gen_models = list_models  # its name in transformers 5.23

    def find(self, name: Any) -> dict[str, Any]:
        """Describe the model of a name."""
        listed = {entry["id"]: entry for entry in self.list_models()}
        if not isinstance(name, str) or name not in listed:
            raise Refused(404, f"There is no model {name!r}; there are {', '.join(listed)}.", "model_not_found")
        return listed[name]

    def check_name(self, name: Any) -> None:
        """Raise a `ValueError` if no expert can have a name here."""
        if not isinstance(name, str) or not name.isprintable() or name in (AUTO, "base", self.base_name):
            raise ValueError(f"No expert of a server can be called {name!r}: give it another name.")

    def shutdown(self) -> None:
        self.engine.stop()


class _State(GenerationState):
    """Hands the engine to every handler."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(continuous_batching=engine.batch is not None)
        self.engine = engine

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        return self.engine.batch is not None

    def get_manager(self, model_id: str, use_cb: bool = False) -> Engine:
        return self.engine

    def is_cb_alive(self) -> bool:
        return self.engine.is_alive()


class _Handler(BaseHandler):
    """What all handlers do: check the body, find the mixture, and put the decision into the answer."""

    model_manager: _Models
    generation_state: _State
    ends: str = "data: [DONE]\n\n"  # of a stream

    def prompt(self, body: Mapping[str, Any]) -> Prompt:
        """What the first pass reads."""
        raise NotImplementedError

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        request, engine = REQUEST.get(), self.generation_state.engine
        request.model = str(body.get("model") or AUTO)[:200]
        try:
            plain = {"stream": False, **{name: value for name, value in body.items() if name not in OURS}}
            self._validate_request(plain)
            prompt = self.prompt(body)
            request.mixture = await self._mixture(body, prompt)
            request.offsets = await asyncio.to_thread(engine.offsets, request.mixture)
            response = await super().handle_request(plain, request_id)  # type: ignore[misc]
        except WRONG as error:
            logger.debug("A request was refused.", exc_info=True)
            raise Refused(400, f"{error}"[:1000] or type(error).__name__) from error
        record = request.mixture.record()
        dispatch = {"mixture": record.pop("alpha", None), **record}
        if isinstance(response, JSONResponse):
            response = JSONResponse({**json.loads(bytes(response.body)), "dispatch": dispatch})
        else:
            response.body_iterator = _with_dispatch(response.body_iterator, dispatch, self.ends)
        response.headers["x-peft-svf-expert"] = quote(request.mixture.choice)
        return response

    async def _mixture(self, body: Mapping[str, Any], prompt: Prompt) -> Mixture:
        """Find the mixture that a body names, or let the first pass choose."""
        models, engine = self.model_manager, self.generation_state.engine
        name, given = body.get("model") or AUTO, {k: body[k] for k in OURS if body.get(k) is not None}
        if not given and name == AUTO:
            return await engine.choose(prompt)
        if not given:
            given = {"expert": OTHER if name in ("base", OTHER, models.base_name) else models.find(name)["id"]}
        if not (isinstance(given.get("expert", ""), str) and isinstance(given.get("mixture", ""), (str, dict))):
            raise ValueError("'expert' is a name, 'mixture' a name or weights such as {\"math\": 0.7}.")
        return (await asyncio.to_thread(engine.model.first_pass, [prompt], **given))[0]

    def _validate_request(self, body: dict[str, Any]) -> None:
        known: set[str] = getattr(self._valid_params_class, "__mutable_keys__", set()) - {"generation_config"}
        if unknown := sorted(set(body) - known):
            raise ValueError(f"Unknown field {unknown[0]!r}.")
        for name in sorted(self._unused_fields & set(IGNORED)):
            if body.get(name) and body[name] != IGNORED[name]:
                raise ValueError(f"{name!r} isn't supported.")
        for name, (low, high) in RANGES.items():
            value = body.get(name)
            if value is not None and not (_number(value) and low <= value <= high):
                raise ValueError(f"{name!r} is a number from {low} to {high}.")
        for name in (*LENGTHS, "seed"):
            value = body.get(name)
            if value is not None and (type(value) is not int or (value < 1 and name != "seed")):
                raise ValueError(f"{name!r} is a {'positive ' if name != 'seed' else ''}whole number.")
        stop = _listed(body.get("stop"))
        if len(stop) > 4 or not all(isinstance(text, str) and 0 < len(text) <= 100 for text in stop):
            raise ValueError("'stop' is a text or up to four, of at most 100 characters each.")
        taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
        if wrong := sorted(set(body.get("chat_template_kwargs") or {}) & set(taken)):
            raise ValueError(f"'chat_template_kwargs' can't set {wrong[0]!r}.")

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        model = self.generation_state.engine.model
        return REQUEST.get().model, self.generation_state.engine.base, model.processor or model.tokenizer

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        request, temperature = REQUEST.get(), body.get("temperature")
        request.seed, request.stop = body.get("seed"), tuple(_listed(body.get("stop")))
        request.max_new_tokens = next((body[name] for name in LENGTHS if body.get(name) is not None), None)
        changed = {"seed": None, "temperature": temperature or None}  # transformers' own seed is the process'
        config = super()._build_generation_config({**body, **changed}, *args, **kwargs)
        config.do_sample = bool(temperature) if temperature is not None else config.do_sample
        return config

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict[str, Any]], modality: Modality) -> list[dict[str, Any]]:
        read = BaseHandler.get_processor_inputs_from_messages(messages, modality)
        for part in (part for message in read if isinstance(message["content"], list) for part in message["content"]):
            if not str(part.get("url", "data:")).startswith("data:"):
                raise ValueError("Images come as data: URLs; this server opens no addresses and no files.")
        return read

    def _read(self, messages: Any) -> Prompt:
        turns = messages if isinstance(messages, list) else []
        if not turns or not all(isinstance(turn, dict) and "role" in turn for turn in turns):
            raise ValueError("'messages' is a list of objects, each with 'role' and 'content'.")
        return self.get_processor_inputs_from_messages(turns, Modality.LLM)


class _Chats(_Handler, ChatCompletionHandler):
    def prompt(self, body: Mapping[str, Any]) -> Prompt:
        return self._read(body.get("messages"))


class _Completions(_Handler, CompletionHandler):
    def prompt(self, body: Mapping[str, Any]) -> Prompt:
        if not isinstance(body.get("prompt"), str):
            raise ValueError("'prompt' is a text.")
        return body["prompt"]


class _Responses(_Handler, ResponseHandler):
    ends = ""

    def prompt(self, body: Mapping[str, Any]) -> Prompt:
        return self._read(self._normalize_input(body))  # type: ignore[arg-type]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


async def _with_dispatch(events: AsyncIterator[str], dispatch: dict[str, Any], end: str) -> AsyncIterator[str]:
    """Put the decision into the first object of a stream."""
    first = f'data: {{"dispatch": {json.dumps(dispatch)}, '
    async for event in events:
        yield event.replace("data: {", first, 1) if first else event
        first = ""
    if end:
        yield end
