"""What /openapi.json says beyond what FastAPI sees: bodies are read by hand, and answers written by
hand."""

from __future__ import annotations

import json
from typing import Any

from serve_apps.http.requests import Body

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
            "required": ["message", "type", "param", "code"],
        },
        "request_id": {"type": "string"},
    },
    "required": ["error", "request_id"],
}
_REASONS = {
    400: "The request is wrong; the message says what.",
    401: "An API key is missing or unknown.",
    403: "The API key may not do this.",
    404: "There is no such thing.",
    408: "The body did not come in time.",
    413: "The body is too long.",
    429: "Too many requests; Retry-After says when to come back.",
    500: "Something went wrong here.",
    503: "Not ready, or too busy; Retry-After says when to come back.",
    504: "The answer took too long.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": reason, "content": {"application/json": {"schema": _ERROR}}}
    for status, reason in _REASONS.items()
}


def _answer(description: str, **properties: Any) -> dict[int | str, dict[str, Any]]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {200: {"description": description, "content": {"application/json": {"schema": schema}}}}


_TEXT = {"type": "string"}
_NUMBER = {"type": "integer"}
_LIST = {"type": "array", "items": {"type": "object"}}
HEALTH = _answer("The model is ready.", status=_TEXT, draft=_TEXT)
LIVE = _answer("Requests are answered.", status=_TEXT)
MODELS = _answer("The models.", object=_TEXT, data=_LIST)
MODEL = _answer("A model.", id=_TEXT, object=_TEXT, created=_NUMBER, owned_by=_TEXT)
TOKENIZED = _answer(
    "Token ids.", count=_NUMBER, max_model_len=_NUMBER, tokens={"type": "array", "items": _NUMBER}
)
DETOKENIZED = _answer("A text.", prompt=_TEXT)
COMPLETION = _answer(
    "The answer; with `stream`, server-sent events.",
    id=_TEXT,
    object=_TEXT,
    created=_NUMBER,
    model=_TEXT,
    choices=_LIST,
    usage={"type": "object"},
)
COMPLETION[200]["content"]["text/event-stream"] = {"schema": _TEXT}


def body(kind: type[Body], path: str, models: list[str]) -> dict[str, Any]:
    """The schema of a body, with the names that `model` may have."""
    place = path.replace("~", "~0").replace("/", "~1")
    here = f"#/paths/{place}/post/requestBody/content/application~1json/schema/$defs/"
    text = json.dumps(kind.model_json_schema()).replace("#/$defs/", here)
    found = json.loads(text)
    found["properties"]["model"] = {"type": "string", "enum": models}
    return {"required": True, "content": {"application/json": {"schema": found}}}
