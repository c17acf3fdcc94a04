"""The HTTP app: routes, and what each does with a request. Knows requests and a target's events;
knows neither Ray nor models.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from linearized.errors import ConfigError
from serve_apps.generation import Description
from serve_apps.http import bodies, playground, requests, schema
from serve_apps.http.answers import Answer, ChatAnswer, CompletionAnswer
from serve_apps.http.errors import ApiError, quoted
from serve_apps.http.fields import Limits
from serve_apps.http.gate import KEY, Gate
from serve_apps.http.guard import Guard, notes_of, request_id
from serve_apps.http.keys import Key, check_rate
from serve_apps.http.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generating,
    TokenizeRequest,
)
from serve_apps.http.streams import Target, Texts
from serve_apps.http.tokens import Tokenizer
from serve_apps.http.writing import Writing

READY_S = 2.0
"""Seconds that /health waits for the target before it answers 503."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class IngressConfig:
    model: str
    """The name under which the target is served."""
    path: str
    """The target's Hugging Face folder, for its tokenizer."""
    max_body: int = 8 * 2**20
    """Largest number of bytes of a request."""
    body_s: float = 30.0
    """Seconds within which a request's body must be there."""
    request_s: float = 600.0
    """Seconds within which an answer must be complete."""
    send_s: float = 60.0
    """Seconds that a client may take nothing of its answer."""
    keys: tuple[Key, ...] = ()
    """Who may ask. Without keys everybody may."""
    rate: str | None = None
    """Requests in a time, such as `60/minute`, for each key. None: any number."""
    concurrency: int | None = None
    """Requests in progress at a time, for each key. None: any number."""
    cors: tuple[str, ...] = ()
    """Origins of web pages that may ask. None may by default."""

    def __post_init__(self) -> None:
        check_rate(self.rate, "rate")
        for name in ("max_body", "body_s", "request_s", "send_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, got {self.concurrency}")


def http_app(target: Target, config: IngressConfig) -> FastAPI:
    """The HTTP app, for any ASGI server.

    Raises:
        ConfigError: the folder holds no tokenizer.
    """
    ingress = _Ingress(target, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        ingress.close()

    app = FastAPI(title="linearized", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_api_route("/", _playground, methods=["GET", "HEAD"], include_in_schema=False)
    _get(app, "/health", ingress.health, schema.HEALTH)
    _get(app, "/live", ingress.live, schema.LIVE)
    _get(app, "/v1/models", ingress.models, schema.MODELS)
    _get(app, "/v1/models/{name:path}", ingress.model, schema.MODEL)
    posts: dict[str, tuple[Callable[..., Any], type[requests.Body], dict[int | str, Any]]] = {
        "/v1/completions": (ingress.completions, CompletionRequest, schema.COMPLETION),
        "/v1/chat/completions": (ingress.chat, ChatRequest, schema.COMPLETION),
        "/tokenize": (ingress.tokenize, TokenizeRequest, schema.TOKENIZED),
        "/detokenize": (ingress.detokenize, DetokenizeRequest, schema.DETOKENIZED),
    }
    for path, (route, body, answers) in posts.items():
        extra = {"requestBody": schema.body(body, path, config.model)}
        app.add_api_route(
            path,
            route,
            methods=["POST"],
            response_model=None,
            responses={**schema.ERRORS, **answers},
            openapi_extra=extra,
        )
    app.add_exception_handler(HTTPException, _on_http_error)
    # The last one is the outermost.
    app.add_middleware(Gate, keys=config.keys, rate=config.rate, concurrency=config.concurrency)
    app.add_middleware(Guard, send_s=config.send_s)
    if config.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _get(
    app: FastAPI, path: str, route: Callable[..., Awaitable[Response]], answers: dict[Any, Any]
) -> None:
    app.add_api_route(path, route, methods=["GET"], responses={**schema.ERRORS, **answers})
    app.add_api_route(path, route, methods=["HEAD"], include_in_schema=False)


async def _playground() -> HTMLResponse:
    return HTMLResponse(playground.PAGE, headers=playground.HEADERS)


class _Ingress:
    def __init__(self, target: Target, config: IngressConfig) -> None:
        self._target = target
        self._config = config
        self._tokenizer = Tokenizer(config.path)
        self._created = int(time.time())
        self._described: Description | None = None

    def close(self) -> None:
        self._tokenizer.close()

    async def health(self) -> JSONResponse:
        """Answers 200 once the target is warm. `draft` says whether its draft replica is linked."""
        try:
            async with asyncio.timeout(READY_S):
                self._described = await self._target.ready()
        except Exception:  # whatever Serve raises: there is no target
            raise _not_ready() from None
        return JSONResponse({"status": "ok", "draft": self._described.draft})

    async def live(self) -> JSONResponse:
        """Answers 200 as long as requests are answered at all."""
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> JSONResponse:
        key: Key | None = request.scope[KEY]
        data = [await self._model()] if _may_use(key, self._config.model) else []
        return JSONResponse({"object": "list", "data": data})

    async def model(self, name: str, request: Request) -> JSONResponse:
        self._check_model(name, request)
        return JSONResponse(await self._model())

    async def completions(self, request: Request) -> Response:
        async def prompts(asked: CompletionRequest) -> list[tuple[int, ...]]:
            return [
                one if isinstance(one, tuple) else await self._tokenizer.encode(one)
                for one in asked.prompt
            ]

        async def echoes(asked: CompletionRequest) -> list[str]:
            if not asked.echo:
                return [""] * len(asked.prompt)
            return [
                one if isinstance(one, str) else await self._tokenizer.decode(one)
                for one in asked.prompt
            ]

        asked = await self._parse(CompletionRequest, request)
        found = await prompts(asked)
        return await self._generate(request, asked, CompletionAnswer, found, await echoes(asked))

    async def chat(self, request: Request) -> Response:
        asked = await self._parse(ChatRequest, request)
        prompt = await self._tokenizer.encode_chat(asked.messages)
        return await self._generate(request, asked, ChatAnswer, [prompt], [""])

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text, or of messages through the chat template."""
        asked = await self._parse(TokenizeRequest, request)
        if asked.messages is not None:
            tokens = await self._tokenizer.encode_chat(asked.messages)
        else:
            text = asked.prompt or ""
            tokens = await self._tokenizer.encode(text, special=asked.add_special_tokens)
        longest = (await self._description()).max_context
        return JSONResponse({"count": len(tokens), "max_model_len": longest, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, with the names of special tokens."""
        asked = await self._parse(DetokenizeRequest, request)
        return JSONResponse({"prompt": await self._tokenizer.decode(asked.tokens, special=True)})

    async def _parse(self, kind: type[requests.Request], request: Request) -> requests.Request:
        config = self._config
        body = await bodies.read(request, limit=config.max_body, seconds=config.body_s)
        limits = await self._limits()
        if len(body) < bodies.LARGE:
            asked = requests.parse(kind, body, limits)
        else:
            asked = await self._tokenizer.run(requests.parse, kind, body, limits)
        if asked.model is not None:
            self._check_model(asked.model, request)
        return asked

    async def _generate(
        self,
        request: Request,
        asked: Generating,
        kind: type[Answer],
        prompts: list[tuple[int, ...]],
        echoes: list[str],
    ) -> Response:
        key: Key | None = request.scope[KEY]
        owner = key.sha256 if key is not None else ""
        seed = asked.seed if asked.seed is not None else secrets.randbits(32)
        limits = await self._limits()
        jobs = asked.generations(prompts, seed=seed, owner=owner, limits=limits)
        answer = kind(
            asked.model,
            (await self._description()).fingerprint,
            seed,
            tokenizer=self._tokenizer,
            logprobs=asked.named is not None,
            with_usage=asked.with_usage,
        )
        deadline = asyncio.get_running_loop().time() + self._config.request_s
        texts = Texts(self._target, jobs, deadline=deadline)
        writing = Writing(
            answer,
            texts,
            jobs,
            tokenizer=self._tokenizer,
            echoes=echoes,
            name=request_id(request.scope),
        )
        notes = notes_of(request.scope)
        notes |= {"stream": asked.stream, "texts": len(jobs)}

        async def end() -> None:
            notes.update(writing.notes())
            await texts.close()

        try:
            await _while_connected(request, texts.start())
            if asked.stream:
                return _Stream(writing.stream(), end)
            whole = await _while_connected(request, writing.whole())
        except BaseException:
            await end()
            raise
        await end()
        return JSONResponse(whole)

    async def _description(self) -> Description:
        if self._described is None:
            try:
                async with asyncio.timeout(self._config.request_s):
                    self._described = await self._target.ready()
            except TimeoutError:
                raise _not_ready() from None
        return self._described

    async def _limits(self) -> Limits:
        described = await self._description()
        return Limits(
            max_context=described.max_context,
            vocab_size=described.vocab_size,
            max_characters=described.max_context * self._tokenizer.longest,
        )

    def _check_model(self, name: str, request: Request) -> None:
        served = self._config.model
        if name != served:
            message = f"there is no model {quoted(name)}; the one served here is {quoted(served)}"
            raise ApiError(404, message, code="model_not_found", param="model")
        if not _may_use(request.scope[KEY], served):
            message = f"this API key may not use the model {quoted(served)}"
            raise ApiError(403, message, code="model_not_allowed", param="model")

    async def _model(self) -> dict[str, Any]:
        """What OpenAI's clients know of a model; and, once it is ready, what ours do."""
        found: dict[str, Any] = {
            "id": self._config.model,
            "object": "model",
            "created": self._created,
            "owned_by": "linearized",
            "chat": self._tokenizer.chats,
        }
        with suppress(Exception):  # whatever Serve raises: there is no target
            async with asyncio.timeout(READY_S):
                self._described = self._described or await self._target.ready()
        if self._described is not None:
            found |= {
                "max_model_len": self._described.max_context,
                "state_bytes": self._described.state_bytes,
                "state_token_bytes": self._described.state_token_bytes,
                "cache_token_bytes": self._described.cache_token_bytes,
            }
        return found


class _Stream(StreamingResponse):
    """Server-sent events of texts, which `end` with it, also if it never begins."""

    def __init__(
        self, events: AsyncGenerator[str, None], end: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._end()


def _may_use(key: Key | None, model: str) -> bool:
    return key is None or key.models is None or model in key.models


def _not_ready() -> ApiError:
    return ApiError(
        503, "the model is not ready yet", code="not_ready", headers={"Retry-After": "1"}
    )


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result.

    Raises:
        ClientDisconnect: the client went away first; the work is cancelled.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _on_http_error(request: Request, error: Exception) -> Response:
    """The router's own errors: unknown route, wrong method."""
    assert isinstance(error, HTTPException)
    place = f"{request.method} {quoted(request.url.path)}"
    messages = {404: ("there is no", "not_found"), 405: ("wrong method:", "method_not_allowed")}
    said, code = messages.get(error.status_code, (str(error.detail), "http_error"))
    raise ApiError(
        error.status_code, f"{said} {place}", code=code, headers=dict(error.headers or {})
    )
