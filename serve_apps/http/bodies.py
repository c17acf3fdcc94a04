"""Bodies of requests: read within a time and a size, and parsed at a bounded cost.

A JSON parser lets no other thread run. So what a body may hold is counted before it is parsed,
and a large one is parsed in a thread: no body stops the other streams for more than some
milliseconds. Knows no request's fields.
"""

from __future__ import annotations

import asyncio
import codecs
import re
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request

from serve_apps.http.errors import ApiError

LARGE = 2**16
"""Bytes from which on a body is parsed in a thread."""
MAX_VALUES = 2**16
"""Values of a body, …"""
MAX_CONTAINERS = 2**14
"""… and lists and objects among them, which take longest: so many are parsed within some 30 ms."""
MAX_ESCAPES = 2**19
"""Characters of a body that are escaped: they take some ten times as long as others."""
PIECE = 2**16
"""Bytes that are looked at before others may go on."""
_MARK = re.compile(rb'[,\[{"]')
_INSIDE = re.compile(rb'(?:[^"\\]{1,1024}+|\\.){0,256}+("?)', re.DOTALL)
"""A string's inside up to its end, or a good part of it."""


async def read(request: Request, *, limit: int, seconds: float) -> bytes:
    """
    Raises:
        ApiError: the body is longer than `limit` bytes, or is not there after so many seconds.
        ClientDisconnect: the client has gone.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        message = f"the body was not there after {seconds:g} s; send it faster, or in parts"
        raise ApiError(
            408, message, code="request_timeout", headers={"Connection": "close"}
        ) from None
    return bytes(body)


def parse(body: bytes, *, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """The JSON object that a body is. null asks for the default, as with OpenAI, and is left out.

    Raises:
        ApiError: it is no JSON object, no Unicode text, or holds more than `max_values` values or
            MAX_ESCAPES escaped characters.
    """
    if _marks(body, b"\\") > MAX_ESCAPES:
        message = f"the body holds more than {MAX_ESCAPES} escaped characters; send them as UTF-8"
        raise ApiError(400, message, code="too_many_values")
    if 1 + _marks(body, b",[{") > min(max_values, MAX_CONTAINERS):
        values, containers = _count(body, max_values)
        if values > max_values or containers > MAX_CONTAINERS:
            most = f"{max_values} values, or {MAX_CONTAINERS} lists and objects"
            message = f"the body holds more than {most}; send less at a time"
            raise ApiError(400, message, code="too_many_values")
    try:
        # It refuses half surrogate pairs ("\\ud800"), and what is nested too deeply.
        found = from_json(body.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_type")
    return {name: value for name, value in found.items() if value is not None}


def _marks(body: bytes, marks: bytes) -> int:
    """How many of them there are, those within strings too. (Values are no more than commas and
    opening brackets, and one.)"""
    starts = range(0, len(body), PIECE)
    return sum(body.count(mark, at, at + PIECE) for at in starts for mark in marks)


def _count(body: bytes, max_values: int) -> tuple[int, int]:
    """The values of a body, and its lists and objects, or one of both that is more than enough."""
    at, values, containers = 0, 1, 0
    while values <= max_values and containers <= MAX_CONTAINERS:
        mark = _MARK.search(body, at)
        if mark is None:
            break
        at = mark.end()
        if mark.group() != b'"':
            values += 1
            containers += mark.group() != b","
            continue
        while at < len(body):
            inside = _INSIDE.match(body, at)
            assert inside is not None
            at = max(inside.end(), at + 1)
            if inside.group(1):
                break
    return values, containers


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is longer than {limit} bytes", code="request_too_large")
