"""What crosses the link between the ingress and a target replica. Knows no socket and no model.

    ingress   Submit, Cancel, More, Leave ->   one text each; any number side by side
    target    <- Said, PromptPart, Failed      the same
    both      StatePart                        the same
    ingress   Lend ->                          a prefix that another target wants
    target    <- StatePart, Lent               the same
    target    <- Status, GoAway                about itself

A text's Said are numbered by nothing: a connection keeps their order, and a text ends with its
connection. The target says no more than WINDOW things about a text before the ingress says that it
has taken some of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linearized.speculative import Alternatives
from serve_apps.generation import (
    GUIDES,
    SPECULATE,
    Delta,
    Description,
    Event,
    Finished,
    Generation,
    Guide,
    Left,
    Refused,
    Started,
)
from serve_apps.link import wire
from serve_apps.link.wire import (
    ALTERNATIVES,
    COUNT,
    FLAG,
    SAMPLING,
    TEXT,
    TOKENS,
    TREE,
    Field,
    choice,
    optional,
    record,
    several,
    string,
)

WINDOW = 32
"""Events of a text that the ingress has not taken yet; then the target waits with it."""
PART = 512
"""Tokens of a prompt whose log-probabilities fit one message."""
MAX_STRING = 2**20
"""Characters of one string in a generation or an event."""
MAX_STOPS = 64
MAX_TAKEN = 1024
"""Tokens of one event."""
MAX_LEVELS = 256
"""Of a drafted tree."""
STATE_PART = 2**17
"""Bytes of a state that one message has."""
MAX_STATE = 2**26
"""Bytes of a state that is handed over. A text with a larger one is read again."""


@dataclass(frozen=True, slots=True)
class Submit:
    text: int
    job: Generation
    lent: bool = False
    """Whether the state that came before it is of a prefix that another target lent."""


@dataclass(frozen=True, slots=True)
class Cancel:
    text: int


@dataclass(frozen=True, slots=True)
class More:
    """Says that the ingress has taken so many events of a text."""

    text: int
    events: int


@dataclass(frozen=True, slots=True)
class Said:
    text: int
    event: Event


@dataclass(frozen=True, slots=True)
class PromptPart:
    """The next of a prompt's log-probabilities. The Started that they belong to comes after them,
    without any."""

    text: int
    logprobs: tuple[Alternatives | None, ...]


@dataclass(frozen=True, slots=True)
class Leave:
    """Asks the target to stop with a text, and for its state."""

    text: int


@dataclass(frozen=True, slots=True)
class Lend:
    """Asks for the state behind the longest prefix of these tokens that the target knows."""

    text: int
    tokens: tuple[int, ...]
    owner: str


@dataclass(frozen=True, slots=True)
class Lent:
    """The state's bytes came before this; none, if the target knows nothing of the text."""

    text: int


@dataclass(frozen=True, slots=True)
class StatePart:
    """The next of a state's bytes. The Left, the Lent or the Submit that they belong to comes after
    them, without any."""

    text: int
    state: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """This target does not go on with the text; another one might."""

    text: int
    message: str


@dataclass(frozen=True, slots=True)
class Status:
    description: Description


def parts(text: int, state: bytes) -> list[StatePart]:
    return [StatePart(text, state[i : i + STATE_PART]) for i in range(0, len(state), STATE_PART)]


def said(text: int, event: Event) -> list[Said | PromptPart]:
    """An event as messages, each of which fits a frame."""
    if not isinstance(event, Started) or len(event.prompt_logprobs) <= PART:
        return [Said(text, event)]
    whole = event.prompt_logprobs
    parts = [PromptPart(text, whole[i : i + PART]) for i in range(0, len(whole), PART)]
    return [*parts, Said(text, Started(cached_tokens=event.cached_tokens))]


_GENERATION = record(
    Generation,
    {
        "prompt": TOKENS,
        "text": TOKENS,
        "max_tokens": COUNT,
        "sampling": SAMPLING,
        "stop": several(string(MAX_STRING), MAX_STOPS),
        "logprobs": optional(COUNT),
        "prompt_logprobs": optional(COUNT),
        "guide": optional(
            record(Guide, {"kind": choice(*GUIDES), "source": string(MAX_STRING)}),
        ),
        "speculate": optional(choice(*SPECULATE)),
        "owner": TEXT,
        "request": TEXT,
        "trees": FLAG,
    },
)
_LEVELS = several(COUNT, MAX_LEVELS)
_PROMPT_LOGPROBS = several(optional(ALTERNATIVES), PART)
_EVENTS: dict[type[Any], Field] = {
    Started: record(Started, {"cached_tokens": COUNT, "prompt_logprobs": _PROMPT_LOGPROBS}),
    Delta: record(
        Delta,
        {
            "text": string(MAX_STRING),
            "tokens": TOKENS,
            "accepted": COUNT,
            "logprobs": several(ALTERNATIVES, MAX_TAKEN),
            "tree": TREE,
        },
    ),
    Finished: record(
        Finished,
        {
            "reason": choice("stop", "length", "error"),
            "drafted": _LEVELS,
            "accepted": _LEVELS,
            "rounds": COUNT,
            "error": string(MAX_STRING),
        },
    ),
    Left: record(Left, {}),
    Refused: record(
        Refused,
        {
            "status": wire.integer(400, 599),
            "message": string(MAX_STRING),
            "code": TEXT,
            "param": optional(TEXT),
            "retry_after": optional(COUNT),
        },
    ),
}
_KINDS = list(_EVENTS)
_DESCRIPTION = record(
    Description,
    {
        "fingerprint": TEXT,
        "vocab_size": COUNT,
        "max_context": COUNT,
        "draft": choice("none", "connected", "away"),
        "texts": COUNT,
        "room": COUNT,
        "state_bytes": COUNT,
        "state_token_bytes": COUNT,
        "cache_token_bytes": COUNT,
    },
)


def _event(value: Any) -> Event:
    kind, fields = wire.array(value, 2)
    return _EVENTS[_KINDS[wire.integer(0, len(_KINDS) - 1).read(kind)]].read(fields)


def _pack_event(event: Event) -> list[Any]:
    kind = type(event)
    return [_KINDS.index(kind), _EVENTS[kind].write(event)]


FIELDS: dict[type[Any], tuple[Field, ...]] = {
    Submit: (COUNT, _GENERATION, FLAG),
    Cancel: (COUNT,),
    More: (COUNT, wire.integer(1, WINDOW)),
    Said: (COUNT, Field(_event, _pack_event)),
    PromptPart: (COUNT, _PROMPT_LOGPROBS),
    Leave: (COUNT,),
    Lend: (COUNT, TOKENS, TEXT),
    Lent: (COUNT,),
    StatePart: (COUNT, wire.blob(STATE_PART)),
    Failed: (COUNT, TEXT),
    Status: (_DESCRIPTION,),
}
