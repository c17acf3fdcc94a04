"""Who comes in: keys, rates, and how much at a time. Middleware before the routes; knows none of
what they do.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence

import limits
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_apps.http import keys
from serve_apps.http.errors import ApiError
from serve_apps.http.guard import notes_of
from serve_apps.http.keys import Key

OPEN = frozenset({"/", "/health", "/live", "/openapi.json"})
"""Paths that need no key."""
KEY = "linearized.key"
"""Where a request's scope has its Key, or None if none are needed."""


class Gate:
    """Lets a request through, or raises ApiError. Without keys everybody is one caller."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[Key],
        rate: str | None,
        concurrency: int | None,
    ) -> None:
        """`rate` and `concurrency` are for each key that has none of its own."""
        self._app = app
        self._keys = tuple(keys)
        self._rate = rate
        self._concurrency = concurrency
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _path(scope) in OPEN:
            await self._app(scope, receive, send)
            return
        key = self._key(scope)
        name = key.name if key is not None else ""
        notes_of(scope)["key"] = name or None
        await self._check_rate(key, name)
        most = self._concurrency if key is None or key.concurrency is None else key.concurrency
        if most is not None and self._running[name] >= most:
            message = f"{most} requests are in progress already; wait for one of them to end"
            raise _too_many(message, "concurrency_limit_exceeded", 1)
        self._running[name] += 1
        try:
            await self._app({**scope, KEY: key}, receive, send)
        finally:
            self._running[name] -= 1

    def _key(self, scope: Scope) -> Key | None:
        if not self._keys:
            return None
        given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        scheme, _, secret = given.partition(" ")
        key = keys.find(self._keys, secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            said = "this API key is unknown" if given else "an API key is missing"
            raise ApiError(
                401,
                f"{said}; send one in the header Authorization: Bearer …",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return key

    async def _check_rate(self, key: Key | None, name: str) -> None:
        rate = self._rate if key is None or key.rate is None else key.rate
        if rate is None:
            return
        limit = limits.parse(rate)
        if not await self._limiter.hit(limit, name):
            stats = await self._limiter.get_window_stats(limit, name)
            seconds = max(1, math.ceil(stats.reset_time - time.time()))
            message = f"more than {limit} requests; try again in {seconds} s"
            raise _too_many(message, "rate_limit_exceeded", seconds)


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _too_many(message: str, code: str, seconds: int) -> ApiError:
    return ApiError(429, message, code=code, headers={"Retry-After": str(seconds)})
