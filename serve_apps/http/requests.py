"""OpenAI's requests as data. Knows no server, no model and no tokenizer.

Nothing is accepted and ignored, with one exception that OpenAI makes too: `user` has no effect.
What is not supported is refused by its name; the values of it that ask for nothing are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from linearized.speculative import Sampling
from serve_apps.generation import Generation, Guide
from serve_apps.http.errors import ApiError, invalid, quoted, too_long, unsupported
from serve_apps.http.fields import (
    Between,
    Guided,
    Limits,
    LogitBias,
    Messages,
    Prompts,
    PromptText,
    ResponseFormat,
    Stop,
    StopTokens,
    Tokens,
)

MAX_TEXTS = 32
"""Texts that one request may ask for: prompts times `n`."""
MAX_LOGPROBS = 20
_SEED = 2**63


class Body(BaseModel):
    """A request's body."""

    model_config = ConfigDict(extra="forbid", strict=True)
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Parameters that OpenAI has, with the values that ask for nothing."""


class StreamOptions(Body):
    include_usage: bool = False
    """Whether one more chunk with the usage and without choices comes before the end."""
    include_rounds: bool = False
    """Whether chunks say what was drafted: `prompt` and `round` in their choices. OpenAI has no
    such option."""


class Generating(Body):
    """What completions and chats have in common."""

    PROMPT: ClassVar[str] = "prompt"
    """The parameter that is the prompt."""
    DEFAULT_TOKENS: ClassVar[int | None] = None
    """Longest text if nothing is said about it. None: as long as the context."""

    model: str
    max_tokens: int | None = Field(default=None, ge=0)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    """Another name of `max_tokens`."""
    min_tokens: int = Field(default=0, ge=0)
    """No end of text, stop string or stop token before the text has so many tokens. OpenAI has no
    such parameter."""
    n: int = Field(default=1, ge=1, le=MAX_TEXTS)
    """Number of texts for each prompt. They get different noise of the same seed."""
    temperature: Annotated[float, Between("temperature", 0, 2)] = 1.0
    top_p: Annotated[float, Between("top_p", 0, 1, above=True)] = 1.0
    top_k: int = Field(default=0, ge=0, lt=2**31)
    """Keep the k most probable tokens; 0 keeps all. OpenAI has no such parameter."""
    min_p: Annotated[float, Between("min_p", 0, 1)] = 0.0
    """Keep the tokens that are at least this fraction as probable as the most probable one. OpenAI
    has no such parameter."""
    presence_penalty: Annotated[float, Between("presence_penalty", -2, 2)] = 0.0
    frequency_penalty: Annotated[float, Between("frequency_penalty", -2, 2)] = 0.0
    repetition_penalty: Annotated[float, Between("repetition_penalty", 0, 10, above=True)] = 1.0
    """Divides the logits of tokens that prompt and text have; 1 does nothing. OpenAI has no such
    parameter."""
    logit_bias: LogitBias = ()
    """Numbers from -100 to 100, which are added to the logits of these tokens."""
    seed: int | None = Field(default=None, ge=-_SEED, lt=_SEED)
    """The same request with the same seed gives the same text. Without a seed, the app draws one,
    and the answer names it."""
    stop: Stop = ()
    """The text ends before the first of these. They may name special tokens, which no text
    shows."""
    stop_token_ids: StopTokens = frozenset()
    """The text ends with one of these tokens, or with the model's own end of text. OpenAI has no
    such parameter."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat = None
    guided: Guided | None = None
    """What the text must be: {"regex": …}, {"grammar": …}, {"choice": […]} or {"json_schema": …}.
    OpenAI has no such parameter."""
    user: str | None = None
    """Has no effect, as with OpenAI."""
    speculate: Literal["model", "ngram", "none"] | None = None
    """Who drafts. The speed depends on it, the text does not. OpenAI has no such parameter."""

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    def named(self) -> int | None:
        """Alternatives that are named for each token; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def with_rounds(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_rounds

    @property
    def guide(self) -> Guide | None:
        return self.guided or self.response_format

    def generations(
        self, prompts: list[tuple[int, ...]], *, seed: int, owner: str, limits: Limits
    ) -> list[Generation]:
        """One for each text, those of one prompt together, numbered through: equal prompts get
        different texts.

        Raises:
            ApiError: a prompt has more tokens than the model takes.
        """
        for prompt in prompts:
            if len(prompt) > limits.max_context:
                most = f"at most {limits.max_context} tokens are served in one request"
                problem = f"{most}; the prompt has {len(prompt)}: shorten it"
                raise too_long(self.PROMPT, problem)
        texts = [prompt for prompt in prompts for _ in range(self.n)]
        return [
            Generation(
                prompt=prompt,
                max_tokens=self._longest(prompt, limits),
                sampling=self._sampling(seed, choice),
                stop=self.stop,
                logprobs=self.named,
                prompt_logprobs=self._named_of_prompt,
                guide=self.guide,
                speculate=self.speculate,
                owner=owner,
                trees=self.with_rounds,
            )
            for choice, prompt in enumerate(texts)
        ]

    def check(self) -> Self:
        """
        Raises:
            ApiError: some parameters do not go together.
        """
        if self.stream_options is not None and not self.stream:
            problem = "stream_options is for streams only; set stream to true or leave it out"
            raise invalid("stream_options", problem)
        asked, other = self.max_tokens, self.max_completion_tokens
        if asked is not None and other is not None and asked != other:
            problem = (
                f"max_tokens is {asked} and max_completion_tokens is {other}; give one of them"
            )
            raise invalid("max_completion_tokens", problem)
        longest = self._asked_tokens()
        if longest is not None and self.min_tokens > longest:
            problem = f"min_tokens is {self.min_tokens}, and max_tokens is {longest}"
            raise invalid("min_tokens", f"{problem}: give no more than that")
        if self.num_prompts * self.n > MAX_TEXTS:
            problem = f"one request makes at most {MAX_TEXTS} texts, prompts times n"
            raise invalid("n", f"{problem}, got {self.num_prompts} times {self.n}")
        if self.guided is not None and self.response_format is not None:
            problem = "guided and response_format both say what the text must be; give one of them"
            raise invalid("guided", problem)
        return self

    def _asked_tokens(self) -> int | None:
        asked = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        return asked if asked is not None else self.DEFAULT_TOKENS

    def _longest(self, prompt: tuple[int, ...], limits: Limits) -> int:
        asked = self._asked_tokens()
        return asked if asked is not None else max(limits.max_context - len(prompt), 1)

    @property
    def _named_of_prompt(self) -> int | None:
        """The same as `named`, for each token of the prompt."""
        return None

    def _sampling(self, seed: int, choice: int) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            min_tokens=self.min_tokens,
            stop_ids=self.stop_token_ids,
            seed=seed,
            choice=choice,
        )


class CompletionRequest(Generating):
    """The body of POST /v1/completions."""

    UNSUPPORTED = {"best_of": (1,), "suffix": ("",)}
    DEFAULT_TOKENS = 16

    prompt: Prompts
    """A text, a list of token ids, or a list of either. Each prompt makes `n` choices."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    """Whether the prompt stands before the text, with its log-probabilities if there are any."""

    @property
    def num_prompts(self) -> int:
        return len(self.prompt)

    @property
    def named(self) -> int | None:
        return self.logprobs

    @property
    def _named_of_prompt(self) -> int | None:
        return self.logprobs if self.echo else None


class ChatRequest(Generating):
    """The body of POST /v1/chat/completions."""

    UNSUPPORTED = {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "metadata": ({},),
        "modalities": (["text"],),
        "parallel_tool_calls": (),
        "prediction": (),
        "prompt_cache_key": (),
        "reasoning_effort": (),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }

    PROMPT = "messages"

    messages: Messages
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def named(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            problem = "top_logprobs needs logprobs; set it to true, or leave top_logprobs out"
            raise invalid("top_logprobs", problem)
        return super().check()


class TokenizeRequest(Body):
    """The body of POST /tokenize: a text, or messages, which the chat template makes a text of."""

    model: str | None = None
    prompt: PromptText | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    """Whether a prompt gets the special tokens that the tokenizer puts around texts. Messages have
    those of their template."""

    def check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("prompt", "give either a prompt or messages")
        return self


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: Tokens

    def check(self) -> Self:
        return self


Request = TypeVar("Request", CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)


def validate(kind: type[Request], values: dict[str, Any], limits: Limits) -> Request:
    """A request of a body's values. `limits` are those of the model that it names.

    Raises:
        ApiError: with the first thing that is wrong.
    """
    _refuse_unsupported(kind, values)
    try:
        request = kind.model_validate(values, context=limits)
    except ValidationError as error:
        raise _api_error(error) from None
    return request.check()


def _refuse_unsupported(kind: type[Body], values: dict[str, Any]) -> None:
    for name in list(values):
        if name in kind.UNSUPPORTED:
            neutral = kind.UNSUPPORTED[name]
            value = values.pop(name)
            if not any(type(value) is type(one) and value == one for one in neutral):
                allowed = " or ".join(["null", *map(quoted, neutral)])
                problem = f"{name} is not supported; leave it out (or {allowed})"
                raise unsupported(name, problem)
        elif name not in kind.model_fields:
            raise _unknown(name)


def _unknown(name: str) -> ApiError:
    param = name if len(name) <= 100 else None
    return ApiError(400, f"unknown parameter {quoted(name)}", code="unknown_parameter", param=param)


def _api_error(error: ValidationError) -> ApiError:
    """Of the first complaint; there are no more than fields."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown(param)
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", code="missing_parameter", param=param)
    problem = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return invalid(param, f"{param}: {problem}, got {quoted(first['input'])}", code)
