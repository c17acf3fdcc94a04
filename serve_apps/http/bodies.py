"""Bodies of requests: read within a time and a size, and parsed at a bounded cost.

Python's JSON parser lets no other thread run. So what a body may hold is counted before it is
parsed, and a large one is parsed in a thread: no body stops the other streams for more than some
milliseconds. Knows no request's fields.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from starlette.requests import Request

from serve_apps.http.errors import ApiError

LARGE = 2**16
"""Bytes from which on a body is parsed in a thread."""
MAX_VALUES = 2**18
"""Values of a body: so many are parsed within some 20 ms."""
_MARK = re.compile(r'[,\[{"]')
_INSIDE = re.compile(r'(?:[^"\\]++|\\.){0,1000}+("?)', re.DOTALL)
"""A string's inside up to its end, or a good part of it."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


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
        ApiError: it is no JSON object, no Unicode text, or holds more than `max_values` values.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _not_text() from None
    if _at_most(text, max_values) > max_values and _count(text, max_values) > max_values:
        message = f"the body holds more than {max_values} values; send less at a time"
        raise ApiError(400, message, code="too_many_values")
    try:
        values = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON: {reason}", code="invalid_json") from None
    # JSON can spell half a surrogate pair ("\ud800"), which is no text for anybody behind.
    if _SURROGATE.search(text) is not None and not _is_text(values):
        raise _not_text()
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_type")
    return {name: value for name, value in values.items() if value is not None}


def _at_most(text: str, enough: int) -> int:
    """No fewer than the values of a body: marks within its strings count, too."""
    if len(text) <= enough:
        return len(text)
    return 1 + sum(text.count(mark) for mark in ",[{")


def _count(text: str, enough: int) -> int:
    """The values of a body, or more than enough."""
    at, found = 0, 1
    while found <= enough and (mark := _MARK.search(text, at)):
        at = mark.end()
        if mark.group() != '"':
            found += 1
            continue
        while at < len(text):
            inside = _INSIDE.match(text, at)
            assert inside is not None
            at = max(inside.end(), at + 1)
            if inside.group(1):
                break
    return found


def _is_text(values: Any) -> bool:
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is longer than {limit} bytes", code="request_too_large")


def _not_text() -> ApiError:
    return ApiError(400, "the body is not Unicode text", code="invalid_json")
