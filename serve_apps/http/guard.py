"""The outermost middleware: a name and a line of the log for every request, an answer for every
exception, and an end to clients that take nothing.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.http.errors import ApiError
from serve_apps.http.streams import TargetLost
from serve_apps.logs import REQUEST

ID = "linearized.request_id"
"""Where a request's scope has its name."""
NOTES = "linearized.notes"
"""Where it has what its line of the log says of it, for whoever knows more."""
QUIET = frozenset({"/", "/health", "/live", "/openapi.json"})
"""Paths that are asked for all the time: only errors are worth a line."""
_NAME = re.compile(rb"[\x21-\x7e]{1,128}")
_HEADER = b"x-request-id"
PATH = 100
"""Characters of a path that are logged."""

log = logging.getLogger(__name__)


class Guard:
    """Whoever stands before the app and names requests, as Ray Serve does, puts the name on the
    answers, too. Otherwise the names are ours."""

    def __init__(self, app: ASGIApp, *, send_s: float) -> None:
        """`send_s`: seconds that a client may take nothing."""
        self._app = app
        self._send_s = send_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(_HEADER)
        named = given is not None and _NAME.fullmatch(given) is not None
        name = given.decode() if given is not None and named else f"req-{secrets.token_hex(12)}"
        started = 0
        notes: dict[str, Any] = {"method": scope["method"], "path": scope["path"][:PATH]}
        began = time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = message["status"]
                if given is None:
                    MutableHeaders(scope=message)[_HEADER.decode()] = name
            try:
                async with asyncio.timeout(self._send_s):
                    await send(message)
            except TimeoutError:
                log.info("%s: the client took nothing for %g s", name, self._send_s)
                raise ClientDisconnect from None

        token = REQUEST.set(name)
        try:
            await self._app({**scope, ID: name, NOTES: notes}, receive, watched)
        except ClientDisconnect:
            notes["left"] = True
        except Exception as error:
            said = explain(error, name)
            notes["code"] = said.code
            if not started:
                body = said.body(name)
                answer = JSONResponse(body, status_code=said.status, headers=said.headers)
                await answer(scope, receive, watched)
        finally:
            notes |= {"status": started or None, "seconds": round(time.monotonic() - began, 4)}
            if scope["path"] not in QUIET or started >= 400:
                log.info("request", extra={"fields": notes})
            REQUEST.reset(token)


def explain(error: Exception, name: str) -> ApiError:
    """What a user is told about any exception. What is no user's matter goes to the log, under the
    request's name."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TargetLost):
        log.warning("request %s: %s", name, error)
        message = "the model's replica has gone; send the request again"
        return ApiError(503, message, code="target_lost", headers={"Retry-After": "1"})
    log.error("request %s: internal error", name, exc_info=error)
    message = f"internal error; the server's log has it as {name}"
    return ApiError(500, message, code="internal")


def request_id(scope: MutableMapping[str, Any]) -> str:
    return str(scope[ID])


def notes_of(scope: MutableMapping[str, Any]) -> dict[str, Any]:
    """What the log will say of a request. Numbers and names, no prompts and no texts."""
    notes: dict[str, Any] = scope[NOTES]
    return notes
