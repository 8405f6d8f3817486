"""The HTTP side: routes, keys and limits, and clients that vanish.

POST /v1/chat/completions    GET /v1/models    GET /v1/models/NAME
GET /health    GET /metrics    GET /           the chat page
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from toolmem.serving.completion import Completion
from toolmem.serving.fields import ApiError, read_json
from toolmem.serving.metrics import Metrics
from toolmem.serving.protocol import ChatRequest, Limits, read_request

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from toolmem.data.tokenizers import Tokenizer
    from toolmem.generation.engine import Engine
    from toolmem.tools.base import Toolbox

log = logging.getLogger("toolmem.serving")

PATHS = ("/", "/health", "/metrics", "/v1/chat/completions", "/v1/models")
OPEN_PATHS = ("/", "/health")  # without a key: they tell nothing
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
RETRY_AFTER_S = (1, 60)  # bounds of what a client is told to wait

PAGE_HEADERS = {
    # The page is one file and talks to this server only.
    "content-security-policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
}


@dataclass
class Service:
    """What is served.

    Args:
        engine: the model's; the server closes it when it stops.
        tokenizer: the model's.
        toolbox: answers the model's calls; None for a model without tools.
        name: what the model is called in requests.
        limits: of a request.
        api_key: that ``/v1`` and ``/metrics`` want; None for no key.
        max_tool_calls: that the tools answer in one dialogue.
        max_seconds: that a dialogue may take; None for any.
        hosts: values of the Host header that are answered; empty for any. A page of another site
            that has its name point to this machine cannot reach a server that knows its own names.
    """

    engine: Engine
    tokenizer: Tokenizer
    toolbox: Toolbox | None
    name: str
    limits: Limits = field(default_factory=Limits)
    api_key: str | None = None
    max_tool_calls: int = 4
    max_seconds: float | None = None
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)
        self.created = int(time.time())

    def begin(self, request: ChatRequest) -> Completion:
        """Hand a checked request to the engine.

        Raises:
            ApiError: another model's, a full engine, a prompt that is too long.
        """
        if request.model not in (None, self.name):
            raise ApiError(
                404,
                f"there is no model {request.model[:100]!r} here: this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )
        try:
            return Completion(
                self.engine,
                self.tokenizer,
                self.toolbox,
                request,
                self.name,
                max_tool_calls=self.max_tool_calls,
                max_seconds=self.max_seconds,
            )
        except ApiError as error:
            if error.status == 429:
                low, high = RETRY_AFTER_S
                wait = min(high, max(low, math.ceil(self.metrics.mean_seconds)))
                error.headers["retry-after"] = str(wait)
            raise

    # Endpoints

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A page of another site may send anything else without asking this server first.
            raise ApiError(415, "send the body as content-type: application/json")
        body = await read_body(request, self.limits.max_body_bytes)
        checked = read_request(read_json(body), self.limits, self.tokenizer)
        # The engine takes a request between two of its steps: the others are not kept waiting for it.
        completion = await asyncio.to_thread(self.begin, checked)
        return CompletionResponse(completion, self.metrics)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        if name != self.name:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here: this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )
        return json_response(self._model())

    def _model(self) -> dict[str, Any]:
        tools = [] if self.toolbox is None else [tool.name for tool in self.toolbox.tools]
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "toolmem",
            "toolmem": {
                "max_seq_len": self.engine.model.max_seq_len,
                "max_tokens": self.limits.max_tokens,
                "tools": tools,
            },
        }

    async def health(self, request: Request) -> Response:
        """GET /health."""
        return json_response({"status": "ok", "model": self.name})

    async def tell_metrics(self, request: Request) -> Response:
        """GET /metrics."""
        # The engine's counts wait for its step: not in the loop that serves everybody.
        text = await asyncio.to_thread(self.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: Request) -> Response:
        """GET /."""
        text = files("toolmem.serving").joinpath("page.html").read_text(encoding="utf-8")
        return Response(text, media_type="text/html", headers=PAGE_HEADERS)


def build_app(service: Service) -> Starlette:
    """The ASGI application of a service."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.close)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.model),
            Route("/health", service.health),
            Route("/metrics", service.tell_metrics),
            Route("/", service.page),
        ],
        middleware=[Middleware(Gate, service=service)],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _bug,
        },
        lifespan=lifespan,
    )


class Gate:
    """Refuses what has no right to come in, and counts what was answered.

    Args:
        app: what stands behind it.
        service: has the key, the hosts and the counts.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.service.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await error_response(error)(scope, receive, counting)
            return
        await self.app(scope, receive, counting)

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.service.hosts and name.lower() not in self.service.hosts:
            raise ApiError(
                403,
                f"this server does not answer for the host {name[:100]!r}: start it with --api_key, "
                "or with the --host that clients name",
            )
        key = self.service.api_key
        if key is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                401,
                "this server wants its API key: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


async def read_body(request: Request, most: int) -> bytes:
    """A request's body, never more than ``most`` bytes of it.

    Raises:
        ApiError: it is longer.
    """
    error = ApiError(
        413, f"the body is longer than {most:,} bytes: send less", code="request_too_large"
    )
    told = request.headers.get("content-length", "0")
    if told.isdigit() and int(told) > most:
        raise error
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise error
        parts.append(part)
    return b"".join(parts)


class CompletionResponse(Response):
    """Sends a completion, streamed or whole; a client that is gone gets its lanes cancelled.

    Args:
        completion: under way.
        metrics: to note its times in.
    """

    def __init__(self, completion: Completion, metrics: Metrics) -> None:
        super().__init__()
        self.completion = completion
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        completion, metrics = self.completion, self.metrics
        work = (
            self._stream(send) if completion.request.stream else self._whole(scope, receive, send)
        )
        sending = asyncio.create_task(work)
        watching = asyncio.create_task(_disconnected(receive))
        metrics.open.inc()
        try:
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                metrics.vanished.inc()
        finally:
            completion.cancel()  # nothing, where all is written
            watching.cancel()
            sending.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
            metrics.open.dec()

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = json_response(await self.completion.answer())
            self._note()
        except ApiError as error:
            response = error_response(error)
        except Exception:
            log.exception("a completion failed")
            response = error_response(_server_error())
        await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx would collect the events
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def tell(text: str, more: bool = True) -> None:
            body = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            async for chunk in self.completion.chunks():
                await tell(json.dumps(chunk))
            self._note()
        except ApiError as error:
            await tell(json.dumps(error.body()))
        except Exception:
            log.exception("a stream failed")
            await tell(json.dumps(_server_error().body()))
        await tell("[DONE]", more=False)

    def _note(self) -> None:
        completion = self.completion
        self.metrics.finished(time.perf_counter() - completion.began)
        if completion.first_token_s is not None:
            self.metrics.first_token.observe(completion.first_token_s)


async def _disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def json_response(
    data: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """JSON in ASCII: whatever the text holds, it can be sent."""
    return Response(json.dumps(data), status, dict(headers or {}), media_type="application/json")


def error_response(error: ApiError) -> Response:
    """An error in OpenAI's shape."""
    return json_response(error.body(), error.status, error.headers)


def _server_error() -> ApiError:
    return ApiError(500, "the server failed: its log says why")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {404: f"there is no {request.url.path[:200]} here", 405: f"not by {request.method}"}
    message = messages.get(error.status_code, error.detail)
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; nginx's word for a client that left


async def _bug(request: Request, error: Exception) -> Response:
    return error_response(_server_error())
