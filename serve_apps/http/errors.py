"""Answers that say what is wrong, in OpenAI's shape. Knows no server and no model."""

from __future__ import annotations

import json
from typing import Any

from serve_apps.generation import Refused

QUOTED = 100
"""Characters of what a user sent that a message repeats."""


class ApiError(Exception):
    """An error answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self, request_id: str) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error, "request_id": request_id}


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """Says that a parameter has a value that cannot be."""
    return ApiError(400, message, code=code, param=param)


def unsupported(param: str, message: str) -> ApiError:
    """Says that a parameter, which others have, is none here."""
    return ApiError(400, message, code="unsupported_parameter", param=param)


def too_long(param: str, message: str) -> ApiError:
    return ApiError(400, message, code="context_length_exceeded", param=param)


def refusal(refused: Refused) -> ApiError:
    """What a target says, as an answer."""
    headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
    return ApiError(
        refused.status, refused.message, code=refused.code, param=refused.param, headers=headers
    )


def quoted(value: object) -> str:
    """A value as its user wrote it, if it is short, and otherwise its beginning."""
    if isinstance(value, str) and len(value) > QUOTED:
        return f"{json.dumps(value[:QUOTED], ensure_ascii=False)}…"
    if isinstance(value, (list, dict)) and value:
        return f"a {'list' if isinstance(value, list) else 'object'} of {len(value)}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}…"
