# SPDX-License-Identifier: Apache-2.0
"""
An ASGI application -> the same behind keys, limits and a time-out, with metrics and logs. Knows no model.

A request is admitted, counted and logged here. If its client leaves or its time is up, it is cancelled.
"""

import asyncio
import json
import logging
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from hmac import compare_digest
from typing import Any

from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .engine import REQUEST, Request

logger = logging.getLogger(__name__)
ANSWERS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
PATHS = (*ANSWERS, "/health", "/metrics", "/v1/models", "/v1/experts")  # the others share one label
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
LEFT = 499  # nginx's status for a client that left
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Rules:
    """Who may ask, and how much."""

    keys: tuple[str, ...] = ()  # without any, everyone may ask
    admin_keys: tuple[str, ...] = ()  # without any, nobody changes experts
    pending: int = 96  # requests at once, those that wait for a slot included
    body_bytes: int = 4 << 20
    seconds: float = 300.0  # for a request, its answer included


class Refused(HTTPException):
    """A request that ends here: an HTTP status, a message and an error code for its client."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Any = None) -> None:
        super().__init__(status, message, headers)
        self.code = code


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """Write an error in OpenAI's form."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def bears(scope: Message, keys: Iterable[str]) -> bool:
    """Check for one of the keys, in a time that doesn't depend on where they differ."""
    header = dict(scope["headers"]).get(b"authorization", b"")
    return any(compare_digest(header, b"Bearer " + key.encode()) for key in keys)


class Metrics:
    """What `/metrics` shows, in Prometheus' text format."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        settings: dict[str, Any] = {"namespace": "peft_svf", "registry": self.registry}
        self.requests = Counter("requests", "Finished requests.", ["path", "expert", "status"], **settings)
        self.tokens = Counter("tokens", "Tokens read and written.", ["kind", "expert"], **settings)
        self.decisions = Counter("decisions", "Choices of the first pass.", ["choice", "strategy"], **settings)
        self.seconds = Histogram("request_seconds", "Time of a request.", ["path"], buckets=BUCKETS, **settings)
        self.first = Histogram("first_token_seconds", "Time to the first token.", buckets=BUCKETS, **settings)
        self.pending = Gauge("pending_requests", "Requests that run or wait.", **settings)

    def count(self, path: str, request: Request, status: int, start: float) -> None:
        """Count a finished request, and log it without its texts."""
        seconds, expert, strategy = time.perf_counter() - start, "", request.mixture.strategy
        facts = {"path": path, "status": status, "seconds": round(seconds, 3)}
        if request.prompt_tokens:
            expert, numbers = request.mixture.choice, {"prompt": request.prompt_tokens, "new": len(request.tokens)}
            for kind, number in numbers.items():
                self.tokens.labels(kind, expert).inc(number)
            if strategy != "explicit":
                self.decisions.labels(expert, strategy).inc()
            facts |= {"model": request.model, "expert": expert, "strategy": strategy, "tokens": numbers}
        self.requests.labels(path, expert, status).inc()
        self.seconds.labels(path).observe(seconds)
        if request.first is not None:
            self.first.observe(request.first - start)
        logger.info(json.dumps(facts))


class Gate:
    """The ASGI application of the server; `pending` requests are inside."""

    def __init__(self, app: Any, rules: Rules, metrics: Metrics) -> None:
        self.app, self.rules, self.metrics = app, rules, metrics
        self.pending = 0
        self.recent = 1.0  # seconds that requests took lately

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, path, request, answer = time.perf_counter(), scope["path"], Request(), _Answer(send)
        counted = path in ANSWERS
        token = REQUEST.set(request)
        try:
            if path != "/health" and self.rules.keys and not bears(scope, self.rules.keys + self.rules.admin_keys):
                raise Refused(401, "This server needs an API key: Authorization: Bearer KEY.", "invalid_api_key")
            body = await asyncio.wait_for(self._read(scope, receive), self.rules.seconds)
            if counted and self.pending >= self.rules.pending:
                message, wait = f"{self.pending} requests are running or waiting: try again later.", self.recent
                raise Refused(429, message, "busy", {"retry-after": str(math.ceil(wait))})
            self.pending += counted
            self.metrics.pending.set(self.pending)
            try:
                await self._run(scope, body, receive, answer, request)
            finally:
                self.pending -= counted
                self.metrics.pending.set(self.pending)
        except asyncio.TimeoutError:
            await answer.refuse(Refused(408, "The body did not arrive in time."))
        except Refused as error:
            await answer.refuse(error)
        except ClientDisconnect:
            answer.status = LEFT
        finally:
            REQUEST.reset(token)
            if counted and answer.status == 200:
                self.recent += (time.perf_counter() - start - self.recent) / 8
            self.metrics.count(path if path in PATHS else "other", request, answer.status, start)

    async def _read(self, scope: Message, receive: Receive) -> bytes:
        body = b""
        async for part in HTTPRequest(scope, receive).stream():
            body += part
            if len(body) > self.rules.body_bytes:
                raise Refused(413, f"The body has more than {self.rules.body_bytes} bytes.")
        return body

    async def _run(self, scope: Message, body: bytes, receive: Receive, answer: "_Answer", request: Request) -> None:
        """Run the application until it has answered, its client leaves, or the time is up."""
        # An id of the client's own could be another request's, whose answer it would get.
        headers = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
        scope = {**scope, "headers": [*headers, (b"x-request-id", uuid.uuid4().hex.encode())]}
        whole = [{"type": "http.request", "body": body, "more_body": False}]
        left = asyncio.ensure_future(_leaving(receive))

        async def replay() -> Message:
            return whole.pop() if whole else await asyncio.shield(left)

        running = asyncio.ensure_future(self.app(scope, replay, answer))
        try:
            await asyncio.wait({running, left}, timeout=self.rules.seconds, return_when=asyncio.FIRST_COMPLETED)
            if running.done() or answer.whole:  # the end of a connection is reported after an answer, too
                return await running
            if left.done():
                raise ClientDisconnect
            # A retry would take as long again.
            raise Refused(504, "The answer took too long.", headers={"x-should-retry": "false"})
        finally:
            if not running.done():
                request.cancel()
                running.cancel()
                await asyncio.wait({running})
            left.cancel()


class _Answer:
    """Sends the messages of an answer, and keeps how far it has come."""

    def __init__(self, send: Send) -> None:
        self.send, self.status, self.streams, self.whole = send, 0, False, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.streams = (b"content-type", b"text/event-stream") in [(n, v[:17]) for n, v in message["headers"]]
        self.whole = message["type"] == "http.response.body" and not message.get("more_body")
        await self.send(message)

    async def refuse(self, error: Refused) -> None:
        """End with an error: as an event if a stream has begun."""
        begun, self.status = self.status, error.status_code
        content = error_body(error.status_code, error.detail, error.code)
        if begun:
            event = f"data: {json.dumps(content)}\n\n".encode() if self.streams else b""
            await self.send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            response = JSONResponse(content, error.status_code, error.headers)
            await response({"type": "http"}, None, self.send)  # type: ignore[arg-type]  # it reads nothing


async def _leaving(receive: Receive) -> Message:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return message
