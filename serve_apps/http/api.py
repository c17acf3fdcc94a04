"""OpenAI's completions API as data: requests, answers, errors. Knows no server and no model.

A request is checked here completely but for what needs the model (token ids, context length).
Nothing is accepted and ignored, with one exception that OpenAI makes too: `user` has no effect.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
)

from linearized.speculative import Sampling
from serve_apps.generation import Finished, Generation

MAX_STOP = 4
MAX_STOP_IDS = 128
MAX_PROMPTS = 32
_SEED = 2**63

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (),
    "n": (1,),
    "presence_penalty": (0,),
    "suffix": ("",),
}
"""OpenAI's parameters that are not supported, with the values that have no effect. Those values and
null are accepted."""


class ApiError(Exception):
    """An error answer in OpenAI's shape."""

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

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    """Whether one more chunk with the usage and without choices comes before the end."""


TokenId = Annotated[StrictInt, Field(ge=0)]
Prompt = (
    StrictStr
    | Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[
        list[Annotated[list[TokenId], Field(min_length=1)]],
        Field(min_length=1, max_length=MAX_PROMPTS),
    ]
)
StopString = Annotated[StrictStr, Field(min_length=1, max_length=1000)]


class CompletionRequest(BaseModel):
    """The body of POST /v1/completions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    prompt: Prompt
    """A text, a list of token ids, or a list of either. Each prompt makes one choice. Prompt i gets
    the choice number i of the seed, so equal prompts get different texts."""
    max_tokens: int = Field(default=16, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, lt=2**31)
    """Keep the k most probable tokens; 0 keeps all. OpenAI has no such parameter."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Keep the tokens that are at least this fraction as probable as the most probable one. OpenAI
    has no such parameter."""
    seed: int | None = Field(default=None, ge=-_SEED, lt=_SEED)
    """The same request with the same seed gives the same text. Without a seed, the app draws one,
    and the answer names it."""
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP)] = []
    """The text ends before the first of these. They may name special tokens, which no text
    shows."""
    stop_token_ids: Annotated[list[TokenId], FailFast(), Field(max_length=MAX_STOP_IDS)] = []
    """The text ends with one of these tokens, or with the model's own end of text.
    OpenAI has no such parameter."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    echo: bool = False
    user: str | None = None
    """Has no effect, as with OpenAI."""
    speculate: Literal["model", "ngram", "none"] | None = None
    """Who drafts. The speed depends on it, the text does not. OpenAI has no such parameter."""

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]  # type: ignore[arg-type]
        return [one if isinstance(one, str) else tuple(one) for one in self.prompt]  # type: ignore[arg-type]

    def generations(self, seed: int) -> list[Generation]:
        """The request as one generation per prompt, as a target takes it."""
        sampling = Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            stop_ids=frozenset(self.stop_token_ids),
            seed=seed,
        )
        return [
            Generation(
                prompt=prompt,
                max_tokens=self.max_tokens,
                sampling=replace(sampling, choice=i),
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
                echo=self.echo,
                speculate=self.speculate,
            )
            for i, prompt in enumerate(self.prompts)
        ]


def parse(body: bytes) -> CompletionRequest:
    """
    Raises:
        ApiError: with the first thing that is wrong.
    """
    values = _load(body)
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_type")
    # null asks for the default, as with OpenAI.
    values = {name: value for name, value in values.items() if value is not None}
    _refuse_unsupported(values)
    try:
        request = CompletionRequest.model_validate(values)
    except ValidationError as error:
        raise _api_error(error, values) from None
    if request.stream_options is not None and not request.stream:
        message = "stream_options is for streams only; set stream to true or leave it out"
        raise ApiError(400, message, code="invalid_value", param="stream_options")
    return request


def _load(body: bytes) -> Any:
    try:
        values = json.loads(body, parse_constant=_no_constant)
        # JSON can spell half a surrogate pair ("\\ud800"), which is no text for anybody behind.
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeError:
        raise ApiError(400, "the body is not Unicode text", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        reason = str(error) or "nested too deeply"
        raise ApiError(400, f"the body is not JSON: {reason}", code="invalid_json") from None
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _refuse_unsupported(values: dict[str, Any]) -> None:
    for name, neutral in UNSUPPORTED.items():
        if name not in values:
            continue
        value = values.pop(name)
        if isinstance(value, bool) or value not in neutral:
            allowed = " or ".join(["null", *(json.dumps(one) for one in neutral)])
            message = f"{name} is not supported yet; leave it out (or {allowed})"
            raise ApiError(400, message, code="unsupported_parameter", param=name)


def _api_error(error: ValidationError, values: dict[str, Any]) -> ApiError:
    """Of the first complaint. A union's branches each have one; the field's name is what helps."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = str(first["loc"][0])
    inner = [str(part) for part in first["loc"][1:] if isinstance(part, int)]
    param = ".".join(map(str, first["loc"])) if field == "stream_options" else field
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter {param}", code="unknown_parameter", param=param)
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", code="missing_parameter", param=param)
    if field == "prompt":
        message = _about_prompt(values["prompt"])
    elif field == "stop":
        message = f"stop must be a string that is not empty, or at most {MAX_STOP} of them"
    elif field == "stop_token_ids":
        message = f"stop_token_ids must be a list of at most {MAX_STOP_IDS} token ids, from 0 on"
    else:
        place = "".join(f"[{part}]" for part in inner)
        message = f"{param}{place}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    kind = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return ApiError(400, message, code=kind, param=param)


def _about_prompt(prompt: Any) -> str:
    if isinstance(prompt, list):
        if not prompt or [] in prompt:
            return "the prompt is empty; give at least one token"
        if len(prompt) > MAX_PROMPTS and not isinstance(prompt[0], int):
            return f"at most {MAX_PROMPTS} prompts fit one request, got {len(prompt)}"
        negative = next((one for one in prompt if type(one) is int and one < 0), None)
        if negative is not None:
            return f"the prompt's token id {negative} is outside the vocabulary"
    return "prompt must be a string, a list of token ids, or a list of either"


class Usage:
    """Counts the tokens of one answer, over all its choices."""

    def __init__(self) -> None:
        self.prompt = self.completion = self.accepted = self.rejected = self.rounds = 0

    def add(self, finished: Finished) -> None:
        self.completion += finished.completion_tokens
        self.accepted += finished.accepted
        self.rejected += finished.rejected
        self.rounds += finished.rounds

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.rejected,
                "verification_rounds": self.rounds,
            },
        }


class Answer:
    """Builds the bodies of one answer, whole or in chunks."""

    def __init__(self, model: str, fingerprint: str, seed: int) -> None:
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
            "seed": seed,
        }

    def body(self, choices: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        if usage is None:
            return {**self._head, "choices": choices}
        return {**self._head, "choices": choices, "usage": usage.body()}

    def chunk(self, choices: list[dict[str, Any]], usage: Usage | None, *, with_usage: bool) -> str:
        """A server-sent event. With `include_usage`, every chunk has a `usage`, which is null in
        all but the last."""
        body: dict[str, Any] = self.body(choices, usage)
        if with_usage:
            body.setdefault("usage", None)
        return event(body)


def choice(index: int, text: str, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def event(body: Any) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"
