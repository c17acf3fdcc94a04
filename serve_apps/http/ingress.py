"""The HTTP side: routes, streams and errors. Knows requests and a target's events; knows neither
Ray nor models.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.generation import Delta, Description, Finished, Started
from serve_apps.http import api
from serve_apps.http.api import ApiError, CompletionRequest
from serve_apps.http.streams import Target, Texts

READY_S = 2.0
"""Seconds that /health waits for the target before it answers 503."""
CLIENT_GONE = 499
"""Status of an answer whose client has gone, as nginx has it. Nobody reads it."""

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class IngressConfig:
    model: str
    """The name under which the target is served."""
    max_body: int = 8 * 2**20
    """Largest number of bytes of a request."""


def http_app(target: Target, config: IngressConfig) -> FastAPI:
    """The HTTP app, for any ASGI server."""
    ingress = _Ingress(target, config)
    app = FastAPI(title="linearized", docs_url=None, redoc_url=None)
    app.add_api_route("/health", ingress.health, methods=["GET"])
    app.add_api_route("/v1/models", ingress.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", ingress.model, methods=["GET"])
    app.add_api_route(
        "/v1/completions",
        ingress.completions,
        methods=["POST"],
        response_model=None,
        openapi_extra={"requestBody": _schema()},
    )
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(Guard)
    return app


class _Ingress:
    def __init__(self, target: Target, config: IngressConfig) -> None:
        self._target = target
        self._config = config
        self._created = int(time.time())
        self._description: Description | None = None

    async def health(self) -> JSONResponse:
        """Answers 200 once the target is warm. `draft` says whether its draft replica is linked."""
        try:
            async with asyncio.timeout(READY_S):
                self._description = await self._target.ready()
        except Exception as error:  # whatever Serve raises: there is no target
            log.info("not ready: %s", error or type(error).__name__)
            raise ApiError(
                503, "the model is not ready yet", code="not_ready", headers={"Retry-After": "1"}
            ) from None
        return JSONResponse({"status": "ok", "draft": self._description.draft})

    async def models(self) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> JSONResponse:
        self._check_model(name)
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Response:
        try:
            body = await _body(request, self._config.max_body)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        asked = api.parse(body)
        self._check_model(asked.model)
        seed = asked.seed if asked.seed is not None else secrets.randbits(32)
        if self._description is None:
            self._description = await self._target.ready()
        answer = api.Answer(asked.model, self._description.fingerprint, seed)
        texts = Texts(self._target, asked.generations(seed))
        try:
            starts = await _while_connected(request, texts.start())
            if asked.stream:
                return StreamingResponse(
                    _stream(asked, answer, texts, starts), media_type="text/event-stream"
                )
            whole = await _while_connected(request, _whole(answer, texts, starts))
        except ClientGone:
            await texts.close()
            return Response(status_code=CLIENT_GONE)
        except BaseException:
            await texts.close()
            raise
        await texts.close()
        return JSONResponse(whole)

    def _check_model(self, name: str) -> None:
        if name != self._config.model:
            message = f"there is no model {name!r}; the one served here is {self._config.model!r}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._config.model,
            "object": "model",
            "created": self._created,
            "owned_by": "linearized",
        }


async def _whole(answer: api.Answer, texts: Texts, starts: list[Started]) -> dict[str, Any]:
    parts = [[start.prompt_text] for start in starts]
    reasons = ["stop"] * len(starts)
    usage = _usage(starts)
    async with aclosing(texts.events()) as events:
        async for index, event in events:
            if isinstance(event, Delta):
                parts[index].append(event.text)
            if isinstance(event, Finished):
                reasons[index] = event.reason
                usage.add(event)
    choices = [api.choice(i, "".join(parts[i]), reasons[i]) for i in range(len(starts))]
    return answer.body(choices, usage)


async def _stream(
    asked: CompletionRequest, answer: api.Answer, texts: Texts, starts: list[Started]
) -> AsyncGenerator[str, None]:
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage
    usage = _usage(starts)
    try:
        for index, start in enumerate(starts):
            if start.prompt_text:
                choices = [api.choice(index, start.prompt_text)]
                yield answer.chunk(choices, None, with_usage=with_usage)
        async with aclosing(texts.events()) as events:
            async for index, event in events:
                if isinstance(event, Delta) and event.text:
                    choices = [api.choice(index, event.text)]
                elif isinstance(event, Finished):
                    usage.add(event)
                    choices = [api.choice(index, "", event.reason)]
                else:
                    continue
                yield answer.chunk(choices, None, with_usage=with_usage)
        if with_usage:
            yield answer.chunk([], usage, with_usage=True)
        yield api.DONE
    except Exception:
        # The status is out already: the error is the stream's last event, and [DONE] is missing.
        yield api.event(_internal_error("in the middle of a stream").body())
    finally:
        await texts.close()


def _usage(starts: list[Started]) -> api.Usage:
    usage = api.Usage()
    usage.prompt = sum(start.prompt_tokens for start in starts)
    return usage


class ClientGone(Exception):
    """The client has gone away, and nobody waits for the answer."""


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result.

    Raises:
        ClientGone: the client went away first; the work is cancelled.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, limit: int) -> bytes:
    """
    Raises:
        ApiError: it is longer than allowed.
    """
    body = bytearray()
    announced = request.headers.get("content-length", "")
    too_long = announced.isdigit() and int(announced) > limit
    if not too_long:
        async for part in request.stream():
            body += part
            if len(body) > limit:
                too_long = True
                break
    if too_long:
        raise ApiError(413, f"the body is longer than {limit} bytes", code="request_too_large")
    return bytes(body)


async def _on_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    """The router's own errors: unknown route, wrong method."""
    assert isinstance(error, HTTPException)
    place = f"{request.method} {request.url.path}"
    messages = {404: ("there is no", "not_found"), 405: ("wrong method:", "method_not_allowed")}
    said, code = messages.get(error.status_code, (str(error.detail), "http_error"))
    body = ApiError(error.status_code, f"{said} {place}", code=code).body()
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


def _internal_error(place: str) -> ApiError:
    """Log the exception that is being handled, under a number that the answer carries."""
    number = f"err-{secrets.token_hex(6)}"
    log.exception("%s: internal error %s", number, place)
    return ApiError(500, f"internal error; the server's log has it as {number}", code="internal")


class Guard:
    """Middleware that turns every exception into an answer. (Serve's proxy gives every answer its
    x-request-id.)"""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            error = _internal_error(f"in {scope['method']} {scope['path']}")
            if not started:
                answer = JSONResponse(error.body(), status_code=error.status)
                await answer(scope, receive, send)


def _schema() -> dict[str, Any]:
    """For /openapi.json: the body is read by hand, so FastAPI does not see its type."""
    schema = json.loads(
        json.dumps(CompletionRequest.model_json_schema()).replace(
            "#/$defs/", "#/paths/~1v1~1completions/post/requestBody/content/"
            "application~1json/schema/$defs/",
        )
    )  # fmt: skip
    return {"required": True, "content": {"application/json": {"schema": schema}}}
