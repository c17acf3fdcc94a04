"""Fields of requests that are more than one number or text: prompts, messages, stop strings,
biases, guides.

Each is checked by hand, its kind and its length before its content, up to the first thing that is
wrong: a list of a million wrong elements costs no more than one of them. The types are for
pydantic, and say in /openapi.json what is taken.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainValidator, ValidationInfo, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

from serve_apps.generation import Guide
from serve_apps.http.errors import invalid, quoted, too_long, unsupported

MAX_PROMPTS = 32
MAX_MESSAGES = 1024
MAX_NAME = 64
MAX_STOP = 4
MAX_STOP_LENGTH = 1000
MAX_STOP_IDS = 128
MAX_BIASES = 1024
MAX_GUIDE = 2**16
"""Characters of a schema, an expression or a grammar."""
MAX_CHOICES_OF_GUIDE = 1024
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""The roles that a message may have, and what the chat template is told. (OpenAI has renamed
`system` to `developer`; templates have not.)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the model behind allows."""

    max_context: int
    """Tokens of prompt and text together."""
    vocab_size: int
    max_characters: int
    """More characters than this are more tokens than `max_context`, whatever they are."""


def _limits(info: ValidationInfo) -> Limits:
    assert isinstance(info.context, Limits)
    return info.context


def _prompts(value: Any, info: ValidationInfo) -> tuple[str | tuple[int, ...], ...]:
    limits = _limits(info)
    many = value if isinstance(value, list) and value and type(value[0]) is not int else [value]
    if len(many) > MAX_PROMPTS:
        raise invalid("prompt", f"at most {MAX_PROMPTS} prompts fit one request, got {len(many)}")
    return tuple(_prompt(one, limits) for one in many)


def _prompt(value: Any, limits: Limits) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return _short_enough(value, "prompt", limits)
    if not isinstance(value, list):
        problem = f"must be a string, a list of token ids, or a list of either, got {quoted(value)}"
        raise invalid("prompt", f"prompt {problem}", "invalid_type")
    if not value:
        raise invalid("prompt", "the prompt is empty; give at least one token")
    if len(value) > limits.max_context:
        most = f"at most {limits.max_context} tokens are served in one request"
        raise too_long("prompt", f"{most}; the prompt has {len(value)}: shorten it")
    return _token_ids(value, "prompt", limits)


def _short_enough(text: str, param: str, limits: Limits) -> str:
    if len(text) > limits.max_characters:
        most = f"at most {limits.max_context} tokens are served in one request"
        raise too_long(param, f"{most}; {param} has {len(text)} characters: shorten it")
    return text


def _text(value: Any, info: ValidationInfo) -> str:
    if not isinstance(value, str):
        raise invalid("prompt", f"prompt must be a string, got {quoted(value)}", "invalid_type")
    return _short_enough(value, "prompt", _limits(info))


def _token_ids(values: list[Any], param: str, limits: Limits) -> tuple[int, ...]:
    for token in values:
        if type(token) is not int:
            problem = f"{param} must be a list of token ids, got {quoted(token)} in it"
            raise invalid(param, problem, "invalid_type")
        if not 0 <= token < limits.vocab_size:
            raise invalid(param, _outside(param, token, limits))
    return tuple(values)


def _outside(param: str, token: int, limits: Limits) -> str:
    return f"{param}: token id {quoted(token)} is outside the vocabulary of {limits.vocab_size}"


def _tokens(value: Any, info: ValidationInfo) -> tuple[int, ...]:
    limits = _limits(info)
    if not isinstance(value, list):
        problem = f"tokens must be a list of token ids, got {quoted(value)}"
        raise invalid("tokens", problem, "invalid_type")
    if len(value) > limits.max_context:
        most = f"at most {limits.max_context} tokens are served in one request"
        raise too_long("tokens", f"{most}, got {len(value)}")
    return _token_ids(value, "tokens", limits)


def _messages(value: Any, info: ValidationInfo) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list):
        problem = f"messages must be a list of messages, got {quoted(value)}"
        raise invalid("messages", problem, "invalid_type")
    if not 0 < len(value) <= MAX_MESSAGES:
        raise invalid("messages", f"give 1 to {MAX_MESSAGES} messages, got {len(value)}")
    messages = tuple(_message(one, f"messages[{i}]") for i, one in enumerate(value))
    limits = _limits(info)
    characters = sum(len(one["content"]) for one in messages)
    if characters > limits.max_characters:
        most = f"at most {limits.max_context} tokens are served in one request"
        raise too_long("messages", f"{most}; messages have {characters} characters: shorten them")
    return messages


def _message(value: Any, place: str) -> dict[str, str]:
    if not isinstance(value, dict):
        problem = f"{place} must be an object with role and content, got {quoted(value)}"
        raise invalid("messages", problem, "invalid_type")
    for name, part in value.items():
        if name not in ("role", "content", "name") and part is not None:
            raise unsupported("messages", f"{place}: {quoted(name)} is not supported; leave it out")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        choices = ", ".join(ROLES)
        raise invalid("messages", f"{place}.role must be one of {choices}, got {quoted(role)}")
    message = {"role": ROLES[role], "content": _content(value.get("content"), f"{place}.content")}
    name = value.get("name")
    if name is not None:
        if not isinstance(name, str) or len(name) > MAX_NAME:
            problem = f"{place}.name must be a string of at most {MAX_NAME} characters"
            raise invalid("messages", f"{problem}, got {quoted(name)}")
        message["name"] = name
    return message


def _content(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        problem = f"{place} must be a string, or a list of text parts, got {quoted(value)}"
        raise invalid("messages", problem, "invalid_type")
    texts = []
    for i, part in enumerate(value):
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or part != {"type": "text", "text": text}:
            shape = '{"type": "text", "text": "…"}'
            raise invalid("messages", f"{place}[{i}] must be {shape}; nothing else is supported")
        texts.append(text)
    return "".join(texts)


def _stop(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list):
        problem = f"stop must be a string, or a list of strings, got {quoted(value)}"
        raise invalid("stop", problem, "invalid_type")
    if len(found) > MAX_STOP:
        raise invalid("stop", f"stop may have at most {MAX_STOP} strings, got {len(found)}")
    for one in found:
        if not isinstance(one, str):
            problem = f"stop must be a string, or a list of strings, got {quoted(one)} in it"
            raise invalid("stop", problem, "invalid_type")
        if not 0 < len(one) <= MAX_STOP_LENGTH:
            most = f"of 1 to {MAX_STOP_LENGTH} characters"
            raise invalid("stop", f"stop must have strings {most}, got one of {len(one)}")
    return tuple(found)


def _stop_token_ids(value: Any, info: ValidationInfo) -> frozenset[int]:
    if not isinstance(value, list):
        problem = f"stop_token_ids must be a list of token ids, got {quoted(value)}"
        raise invalid("stop_token_ids", problem, "invalid_type")
    if len(value) > MAX_STOP_IDS:
        most = f"stop_token_ids may have at most {MAX_STOP_IDS} token ids"
        raise invalid("stop_token_ids", f"{most}, got {len(value)}")
    return frozenset(_token_ids(value, "stop_token_ids", _limits(info)))


def _logit_bias(value: Any, info: ValidationInfo) -> tuple[tuple[int, float], ...]:
    limits = _limits(info)
    if not isinstance(value, dict):
        problem = f"logit_bias must be an object, token ids to numbers, got {quoted(value)}"
        raise invalid("logit_bias", problem, "invalid_type")
    if len(value) > MAX_BIASES:
        most = f"logit_bias may have at most {MAX_BIASES} token ids"
        raise invalid("logit_bias", f"{most}, got {len(value)}")
    biases: dict[int, float] = {}
    for name, bias in value.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise invalid("logit_bias", f"logit_bias: {quoted(name)} is no token id")
        if int(name) >= limits.vocab_size:
            raise invalid("logit_bias", _outside("logit_bias", int(name), limits))
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            problem = f"logit_bias must have numbers from -100 to 100, got {quoted(bias)}"
            raise invalid("logit_bias", problem)
        biases[int(name)] = float(bias)
    return tuple(sorted(biases.items()))


def _response_format(value: Any) -> Guide | None:
    kinds = ("text", "json_object", "json_schema")
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        problem = f"response_format must be an object whose type is one of {', '.join(kinds)}"
        raise invalid("response_format", f"{problem}, got {quoted(kind or value)}")
    _refuse_others("response_format", value, ("type", kind) if kind == "json_schema" else ("type",))
    if kind == "text":
        return None
    if kind == "json_object":
        return Guide("json")
    named = value.get("json_schema")
    if not isinstance(named, dict) or "schema" not in named:
        problem = "response_format.json_schema must be an object with a schema"
        raise invalid("response_format", f"{problem}, got {quoted(named)}")
    _refuse_others("response_format.json_schema", named, ("name", "schema", "strict"))
    if not isinstance(named.get("name", ""), str) or named.get("strict") not in (None, True, False):
        problem = "response_format.json_schema has a name that is a string, and strict that is true"
        raise invalid("response_format", f"{problem} or false")
    return Guide("json_schema", _schema(named["schema"], "response_format"))


def _guided(value: Any) -> Guide:
    kinds = ("regex", "grammar", "choice", "json_schema")
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in kinds:
        problem = f"guided must be an object with one of {', '.join(kinds)}, got {quoted(value)}"
        raise invalid("guided", problem)
    ((kind, source),) = value.items()
    if kind == "json_schema":
        return Guide(kind, _schema(source, "guided"))
    if kind == "choice":
        if not isinstance(source, list) or not 0 < len(source) <= MAX_CHOICES_OF_GUIDE:
            problem = f"guided.choice must be a list of 1 to {MAX_CHOICES_OF_GUIDE} strings"
            raise invalid("guided", f"{problem}, got {quoted(source)}")
        wrong = next((one for one in source if not isinstance(one, str) or not one), None)
        if wrong is not None:
            problem = f"guided.choice must have strings that are not empty, got {quoted(wrong)}"
            raise invalid("guided", problem)
        return Guide(kind, _json(source, "guided"))
    if not isinstance(source, str) or not source:
        problem = f"guided.{kind} must be a string that is not empty, got {quoted(source)}"
        raise invalid("guided", problem)
    return Guide(kind, _source(source, "guided"))


def _schema(value: Any, param: str) -> str:
    if not isinstance(value, dict):
        raise invalid(param, f"{param}: a JSON schema is an object, got {quoted(value)}")
    return _json(value, param)


def _json(value: Any, param: str) -> str:
    """As JSON, if that is short enough: to write a long one stops everybody for long."""
    left, rest = MAX_GUIDE, [value]
    while rest and left >= 0:
        one = rest.pop()
        if isinstance(one, str):
            left -= len(one)
        elif isinstance(one, dict):
            left -= sum(map(len, one))
            rest += one.values()
        elif isinstance(one, list):
            rest += one
    if left < 0:
        raise invalid(param, f"{param} may have {MAX_GUIDE} characters, got more")
    try:
        return _source(json.dumps(value, ensure_ascii=False), param)
    except RecursionError:
        raise invalid(param, f"{param}: the JSON schema is nested too deeply") from None


def _source(text: str, param: str) -> str:
    if len(text) > MAX_GUIDE:
        raise invalid(param, f"{param} may have {MAX_GUIDE} characters, got {len(text)}")
    return text


def _refuse_others(param: str, value: dict[str, Any], known: tuple[str, ...]) -> None:
    other = next((name for name in value if name not in known), None)
    if other is not None:
        name = f"{param}.{other}" if len(other) <= 100 else param
        raise invalid(name, f"unknown parameter {quoted(other)} in {param}", "unknown_parameter")


@dataclass(frozen=True, slots=True)
class Between:
    """Marks a field as a number from `least`, or above it, to `most`. (pydantic's own check does
    not stand numbers of 400 digits.)"""

    param: str
    least: float
    most: float
    above: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        least = "exclusiveMinimum" if self.above else "minimum"
        return {"type": "number", least: self.least, "maximum": self.most}

    def check(self, value: Any) -> float:
        if type(value) not in (int, float):
            problem = f"{self.param} must be a number, got {quoted(value)}"
            raise invalid(self.param, problem, "invalid_type")
        if not self.least <= value <= self.most or (self.above and value == self.least):
            between = f"lie between {self.least:g} and {self.most:g}"
            if self.above:
                between = f"be above {self.least:g} and at most {self.most:g}"
            raise invalid(self.param, f"{self.param} must {between}, got {quoted(value)}")
        return float(value)


_TOKEN = {"type": "integer", "minimum": 0}
_TOKENS = {"type": "array", "items": _TOKEN, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
_PROMPTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        _TOKENS,
        {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}
_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART, "minItems": 1}],
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": _CONTENT,
        "name": {"type": "string", "maxLength": MAX_NAME},
    },
    "required": ["role", "content"],
    "additionalProperties": False,
}
_STOP_STRING = {**_TEXT, "maxLength": MAX_STOP_LENGTH}
_STOP = {"anyOf": [_STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOP}]}
_BIAS = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": MAX_BIASES,
}
_RESPONSE_FORMAT = {
    "type": "object",
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "json_schema": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "schema": {"type": "object"},
                "strict": {"type": "boolean"},
            },
            "required": ["schema"],
            "additionalProperties": False,
        },
    },
    "required": ["type"],
    "additionalProperties": False,
}
_GUIDED = {
    "type": "object",
    "properties": {
        "regex": _TEXT,
        "grammar": _TEXT,
        "choice": {"type": "array", "items": _TEXT, "minItems": 1},
        "json_schema": {"type": "object"},
    },
    "minProperties": 1,
    "maxProperties": 1,
    "additionalProperties": False,
}

Prompts = Annotated[
    tuple[str | tuple[int, ...], ...], PlainValidator(_prompts), WithJsonSchema(_PROMPTS)
]
"""A text, a list of token ids, or a list of either."""
PromptText = Annotated[str, PlainValidator(_text), WithJsonSchema({"type": "string"})]
Messages = Annotated[
    tuple[dict[str, str], ...],
    PlainValidator(_messages),
    WithJsonSchema({"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": MAX_MESSAGES}),
]
Tokens = Annotated[
    tuple[int, ...],
    PlainValidator(_tokens),
    WithJsonSchema({"type": "array", "items": _TOKEN}),
]
Stop = Annotated[tuple[str, ...], PlainValidator(_stop), WithJsonSchema(_STOP)]
StopTokens = Annotated[
    frozenset[int],
    PlainValidator(_stop_token_ids),
    WithJsonSchema({"type": "array", "items": _TOKEN, "maxItems": MAX_STOP_IDS}),
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...], PlainValidator(_logit_bias), WithJsonSchema(_BIAS)
]
ResponseFormat = Annotated[
    Guide | None, PlainValidator(_response_format), WithJsonSchema(_RESPONSE_FORMAT)
]
Guided = Annotated[Guide, PlainValidator(_guided), WithJsonSchema(_GUIDED)]
