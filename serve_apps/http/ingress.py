"""The HTTP app: routes, and what each does with a request. Knows requests and a target's events;
knows neither Ray nor models.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from linearized.errors import ConfigError
from serve_apps.http import bodies, playground, requests, schema
from serve_apps.http.answers import Answer, ChatAnswer, CompletionAnswer, written
from serve_apps.http.errors import ApiError, quoted
from serve_apps.http.gate import KEY, Gate
from serve_apps.http.guard import Guard, notes_of, request_id
from serve_apps.http.keys import Key, check_rate
from serve_apps.http.models import Model
from serve_apps.http.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generating,
    TokenizeRequest,
)
from serve_apps.http.streams import Texts
from serve_apps.http.writing import Writing

READY_S = 2.0
"""Seconds that /health waits for the targets before it answers 503."""
CLOSE_S = 5.0
_DRAFTS = ("away", "none", "connected")
"""States of a draft, the worst first."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class IngressConfig:
    max_context: int = 0
    """Largest number of tokens that one of the models takes."""
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


def http_app(models: Sequence[Model], config: IngressConfig) -> FastAPI:
    """The HTTP app, for any ASGI server. The models are closed when it ends."""
    ingress = _Ingress(models, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await ingress.close()

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
        extra = {"requestBody": schema.body(body, path, [model.name for model in models])}
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
    def __init__(self, models: Sequence[Model], config: IngressConfig) -> None:
        self._models = {model.name: model for model in models}
        self._config = config

    async def close(self) -> None:
        """Takes no longer than CLOSE_S, whatever happens to the connections."""
        closing = [asyncio.create_task(model.close()) for model in self._models.values()]
        await asyncio.wait(closing, timeout=CLOSE_S)

    async def health(self) -> JSONResponse:
        """Answers 200 once all targets are warm. `draft` says whether they have a draft: the worst
        that one of them says."""
        asked = (model.ready(READY_S) for model in self._models.values())
        drafts = [described.draft for described in await asyncio.gather(*asked)]
        return JSONResponse({"status": "ok", "draft": min(drafts, key=_DRAFTS.index)})

    async def live(self) -> JSONResponse:
        """Answers 200 as long as requests are answered at all."""
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> JSONResponse:
        key: Key | None = request.scope[KEY]
        mine = [one for one in self._models.values() if _may_use(key, one.name)]
        data = await asyncio.gather(*(one.shown(READY_S) for one in mine))
        return JSONResponse({"object": "list", "data": data})

    async def model(self, name: str, request: Request) -> JSONResponse:
        return JSONResponse(await self._find(name, request).shown(READY_S))

    async def completions(self, request: Request) -> Response:
        model, asked = await self._parse(CompletionRequest, request)
        tokenizer = model.tokenizer
        prompts = [
            one if isinstance(one, tuple) else await tokenizer.encode(one) for one in asked.prompt
        ]
        echoes = [""] * len(asked.prompt)
        if asked.echo:
            echoes = [
                one if isinstance(one, str) else await tokenizer.decode(one) for one in asked.prompt
            ]
        return await self._generate(request, model, asked, CompletionAnswer, prompts, echoes)

    async def chat(self, request: Request) -> Response:
        model, asked = await self._parse(ChatRequest, request)
        prompt = await model.tokenizer.encode_chat(asked.messages)
        return await self._generate(request, model, asked, ChatAnswer, [prompt], [""])

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text, or of messages through the chat template."""
        model, asked = await self._parse(TokenizeRequest, request)
        if asked.messages is not None:
            tokens = await model.tokenizer.encode_chat(asked.messages)
        else:
            text = asked.prompt or ""
            tokens = await model.tokenizer.encode(text, special=asked.add_special_tokens)
        longest = (await model.description()).max_context
        found = {"count": len(tokens), "max_model_len": longest, "tokens": tokens}
        return _json(await model.tokenizer.run(written, found))

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, with the names of special tokens."""
        model, asked = await self._parse(DetokenizeRequest, request)
        return JSONResponse({"prompt": await model.tokenizer.decode(asked.tokens, special=True)})

    async def _parse(
        self, kind: type[requests.Request], request: Request
    ) -> tuple[Model, requests.Request]:
        """A request, and the model that it is for."""
        config = self._config
        body = await bodies.read(request, limit=config.max_body, seconds=config.body_s)
        large = len(body) >= bodies.LARGE
        # A prompt of ids may be as long as the context is.
        most = max(bodies.MAX_VALUES, 2 * config.max_context)
        values = await self._run(large, bodies.parse, body, max_values=most)
        model = self._find(values.get("model"), request)
        limits = await model.limits()
        return model, await self._run(large, requests.validate, kind, values, limits)

    async def _run(self, large: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Here, or in a thread where it would hold up the others."""
        if not large:
            return work(*args, **kwargs)
        tokenizer = next(iter(self._models.values())).tokenizer
        return await tokenizer.run(work, *args, **kwargs)

    async def _generate(
        self,
        request: Request,
        model: Model,
        asked: Generating,
        kind: type[Answer],
        prompts: list[tuple[int, ...]],
        echoes: list[str],
    ) -> Response:
        key: Key | None = request.scope[KEY]
        owner = key.sha256 if key is not None else ""
        seed = asked.seed if asked.seed is not None else secrets.randbits(32)
        limits = await model.limits()
        jobs = asked.generations(prompts, seed=seed, owner=owner, limits=limits)
        answer = kind(
            model.name,
            (await model.description()).fingerprint,
            seed,
            tokenizer=model.tokenizer,
            logprobs=asked.named is not None,
            with_usage=asked.with_usage,
        )
        deadline = asyncio.get_running_loop().time() + self._config.request_s
        texts = Texts(model.target, jobs, deadline=deadline)
        writing = Writing(
            answer,
            texts,
            jobs,
            tokenizer=model.tokenizer,
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
        return _json(whole)

    def _find(self, name: Any, request: Request) -> Model:
        """The model of this name; where a single one is served, it need not be named.

        Raises:
            ApiError: there is none, or the key may not use it.
        """
        key: Key | None = request.scope[KEY]
        mine = [one for one in self._models if _may_use(key, one)]
        served = ", ".join(map(quoted, mine))
        if name is None and len(self._models) > 1:
            message = f"model is missing; choose from {served}"
            raise ApiError(400, message, code="missing_parameter", param="model")
        if type(name) is str and name not in self._models:
            message = f"there is no model {quoted(name)}; served here: {served}"
            raise ApiError(404, message, code="model_not_found", param="model")
        # What is wrong with a name that is no text is said with the rest.
        found = name if type(name) is str else next(iter(mine or self._models))
        if found not in mine:
            message = f"this API key may not use the model {quoted(found)}"
            raise ApiError(403, message, code="model_not_allowed", param="model")
        return self._models[found]


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


def _json(written: str) -> Response:
    return Response(written, media_type="application/json")


def _may_use(key: Key | None, model: str) -> bool:
    return key is None or key.models is None or model in key.models


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
