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
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from jinja2 import TemplateError
from prometheus_client import generate_latest
from pydantic import BaseModel, Field, ValidationError
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
Count = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=100)]


class Fields(BaseModel, extra="allow", strict=True):
    """The fields of a request whose values are checked here; the others are transformers'."""

    model: str | None = None
    expert: str | None = None
    mixture: str | dict[str, Any] | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1)
    prompt: str | None = None
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    max_output_tokens: Count | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=1e-6, le=1)
    frequency_penalty: float | None = Field(None, ge=-0.99, le=2)


class Addition(BaseModel):
    """The body of `POST /v1/experts`."""

    source: str
    name: str | None = None


def build(engine: Engine, rules: Rules, folder: Path | None = None) -> Gate:
    """Build the ASGI application, which stops the engine when it ends; admins may add the experts in `folder`."""
    models, metrics, library = _Models(engine), Metrics(), engine.model.library
    for name in [*library.names, *library.mixtures]:
        models.check_name(name)
    handlers = [kind(models, _State(engine)) for kind in (_Chats, _Completions, _Responses)]
    app: FastAPI = build_server(models, *handlers, None, None, _State(engine))
    app.state.engine = engine
    # Not the routes that load and drop models for anyone who asks.
    app.router.routes[:] = [r for r in app.routes if getattr(r, "path", "") in (*ANSWERS, "/v1/models", "/health")]
    for kind in (HTTPException, RequestValidationError, CBWorkerDeadError, ValueError, OSError, Exception):
        app.add_exception_handler(kind, _failure)

    def check_admin(request: HTTPRequest) -> None:
        if not bears(request.scope, rules.admin_keys):
            raise Refused(403, "Experts are added and removed with an admin key.")

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        return models.find(name)

    @app.get("/metrics")
    def show_metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.post("/v1/experts", dependencies=[Depends(check_admin)])
    def add(body: Addition) -> dict[str, Any]:
        # looked up among names, so that none is ever joined to a path
        sources = {path.name: path for path in folder.iterdir() if path.is_dir()} if folder else {}
        if body.source not in sources:
            raise Refused(400, f"There is no expert {body.source!r} in the server's folder.")
        engine.add(sources[body.source], models.check_name(body.name or body.source))
        return {"object": "list", "data": models.list_models()}

    @app.delete("/v1/experts/{name:path}", dependencies=[Depends(check_admin)])
    def remove(name: str) -> dict[str, Any]:
        engine.remove(name)
        return {"object": "list", "data": models.list_models()}

    return Gate(app, rules, metrics)


async def _failure(request: HTTPRequest, error: Any) -> JSONResponse:
    """Answer an error in OpenAI's form."""
    status, message = 500, "The server failed at this request."
    if isinstance(error, HTTPException):
        status, message = 400 if error.status_code == 422 else error.status_code, error.detail
    elif isinstance(error, CBWorkerDeadError):
        status, message = 503, str(error)
    elif isinstance(error, (RequestValidationError, ValueError, OSError)):
        status, message = 400, _message(error)
    return JSONResponse(error_body(status, message, getattr(error, "code", None)), status)


def _message(error: Exception) -> str:
    """Describe an error in what a client sent; of several fields that pydantic refuses, the first."""
    if isinstance(error, (ValidationError, RequestValidationError)):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))!r}: {first['msg']}."
    return f"{error}{' is missing' if isinstance(error, KeyError) else ''}"[:1000] or type(error).__name__


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

    def find(self, name: str) -> dict[str, Any]:
        """Describe the model of a name."""
        listed = {entry["id"]: entry for entry in self.list_models()}
        if name not in listed:
            raise Refused(404, f"There is no model {name!r}; there are {', '.join(listed)}.", "model_not_found")
        return listed[name]

    def check_name(self, name: str) -> str:
        """Return a name that an expert or mixture may have here; else a `ValueError`."""
        if not name.isprintable() or name in (AUTO, "base", self.base_name):
            raise ValueError(f"No expert or mixture of a server can be called {name!r}: give it another name.")
        return name

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
    ends: str = "data: [DONE]\n\n"  # the last event of a stream

    def prompt(self, body: Mapping[str, Any]) -> Prompt:
        """Return what the first pass reads."""
        return self.get_processor_inputs_from_messages(body["messages"], Modality.LLM)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        request, engine = REQUEST.get(), self.generation_state.engine
        request.model = str(body.get("model") or AUTO)[:200]
        try:
            Fields.model_validate(body)
            plain = {"stream": False, **{name: value for name, value in body.items() if name not in OURS}}
            self._check_known(plain)
            request.mixture = await self._mixture(body, self.prompt(body))
            request.offsets = await asyncio.to_thread(engine.offsets, request.mixture)
            response = await super().handle_request(plain, request_id)  # type: ignore[misc]
        except WRONG as error:
            logger.debug("A request was refused.", exc_info=True)
            raise Refused(400, _message(error)) from error
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
        return (await asyncio.to_thread(engine.model.first_pass, [prompt], **given))[0]

    def _validate_request(self, body: dict[str, Any]) -> None:
        """Do nothing: `handle_request` has checked the fields before the first pass."""

    def _check_known(self, body: Mapping[str, Any]) -> None:
        """Refuse the first field that would be ignored, or would replace an argument of the chat template."""
        known: set[str] = getattr(self._valid_params_class, "__mutable_keys__", set()) - {"generation_config"}
        ignored = self._unused_fields & set(IGNORED)
        for name, value in sorted(body.items()):
            if name not in known or (name in ignored and value and value != IGNORED[name]):
                raise ValueError(f"{name!r} isn't supported.")
        taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
        if wrong := sorted(set(body.get("chat_template_kwargs") or {}) & set(taken)):
            raise ValueError(f"'chat_template_kwargs' can't set {wrong[0]!r}.")

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        model = self.generation_state.engine.model
        return REQUEST.get().model, self.generation_state.engine.base, model.processor or model.tokenizer

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        request, temperature = REQUEST.get(), body.get("temperature")
        request.seed, stop = body.get("seed"), body.get("stop") or ()
        request.stop = (stop,) if isinstance(stop, str) else tuple(stop)
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


class _Chats(_Handler, ChatCompletionHandler):
    pass


class _Completions(_Handler, CompletionHandler):
    def prompt(self, body: Mapping[str, Any]) -> Prompt:
        return body["prompt"]


class _Responses(_Handler, ResponseHandler):
    ends = ""

    def prompt(self, body: Mapping[str, Any]) -> Prompt:
        return super().prompt({"messages": self._normalize_input(body)})  # type: ignore[arg-type]


async def _with_dispatch(events: AsyncIterator[str], dispatch: dict[str, Any], end: str) -> AsyncIterator[str]:
    """Put the decision into the first object of a stream."""
    first = f'data: {{"dispatch": {json.dumps(dispatch)}, '
    async for event in events:
        yield event.replace("data: {", first, 1) if first else event
        first = ""
    if end:
        yield end
