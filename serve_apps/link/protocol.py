"""What crosses the link between a target and a draft replica: messages and their bytes.

A frame is a length (4 bytes, big-endian) and a msgpack array: the message's number, then its
fields. Bytes come from a network and are checked one by one. Knows no socket and no model.

    draft   Challenge ->                       a nonce
    target  <- Hello                           proof that it knows the secret, a nonce of its own
    draft   Welcome ->                         proof that it knows the secret too
    target  <- Open, Commit, Close             one text each; any number side by side
    draft   Draft, Error, GoAway ->
    both    Heartbeat

Everything may be lost, repeated or late: `base` says how many tokens a message builds on, `epoch`
counts how often a session was opened, and whatever does not fit is ignored. A commit that the draft
cannot place is answered by an Error, and the target opens the session anew with all its tokens.

Open and Commit ask for a tree. The draft answers as soon as it is as deep as was asked for, goes on
drafting below it while the target verifies, and sends what has become of it, for the same base. The
part of it behind the tokens that the target has chosen since is a tree for the text as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from linearized.errors import LinearizedError
from linearized.speculative import Sampling, TokenTree

VERSION = 3
HEADER = 4
MAX_FRAME = 8 * 2**20
"""Bytes after the header; an Open with 1.6 million tokens."""
MAX_HANDSHAKE = 512
"""Bytes that a peer may send before it has shown that it knows the secret."""
MAX_NODES = 256
"""Of one drafted tree."""
MAX_DEPTH = 64
"""Levels of a tree that may be asked for."""

UNKNOWN_SESSION = "unknown_session"
"""The draft has forgotten the session or lost its thread: open it anew."""
REFUSED = "refused"
"""The draft cannot draft for the session, now or later."""


class ProtocolError(LinearizedError):
    """Bytes that are no message of this version, or a message that fits no frame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where a draft replica listens. Travels through a Serve handle, inside the cluster."""

    host: str
    port: int
    secret: bytes
    fingerprint: str
    vocab_size: int

    def __repr__(self) -> str:
        return f"Endpoint({self.host}:{self.port})"  # never the secret


@dataclass(frozen=True, slots=True)
class Challenge:
    version: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Hello:
    version: int
    nonce: bytes
    proof: bytes


@dataclass(frozen=True, slots=True)
class Welcome:
    proof: bytes


@dataclass(frozen=True, slots=True)
class Open:
    session: int
    epoch: int
    tokens: tuple[int, ...]
    num_prompt: int
    """How many of the tokens are the prompt."""
    sampling: Sampling
    vocab_size: int
    """The target's; a draft with another one has another tokenizer."""
    depth: int
    """Levels of the tree that is asked for."""


@dataclass(frozen=True, slots=True)
class Commit:
    session: int
    epoch: int
    base: int
    """Tokens that the session had before."""
    tokens: tuple[int, ...]
    depth: int
    """Levels of the tree that is asked for."""


@dataclass(frozen=True, slots=True)
class Draft:
    session: int
    epoch: int
    base: int
    """Tokens that the session had when this was drafted."""
    tree: TokenTree


@dataclass(frozen=True, slots=True)
class Close:
    session: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    pass


@dataclass(frozen=True, slots=True)
class GoAway:
    """The draft replica is about to end; look for another one."""


@dataclass(frozen=True, slots=True)
class Error:
    session: int
    epoch: int
    code: str
    message: str


Message = Challenge | Hello | Welcome | Open | Commit | Draft | Close | Heartbeat | GoAway | Error


def encode(message: Message) -> bytes:
    """The whole frame.

    Raises:
        ProtocolError: it is longer than a frame may be.
    """
    payload = msgpack.packb([_NUMBERS[type(message)], *_pack(message)])
    if len(payload) > MAX_FRAME:
        raise ProtocolError(f"a message of {len(payload)} bytes; at most {MAX_FRAME} fit a frame")
    return len(payload).to_bytes(HEADER, "big") + payload


def frame_size(header: bytes, *, limit: int = MAX_FRAME) -> int:
    """Bytes that follow this header.

    Raises:
        ProtocolError: none, or more than a frame may have.
    """
    size = int.from_bytes(header, "big")
    if not 0 < size <= limit:
        raise ProtocolError(f"a frame of {size} bytes; between 1 and {limit} are allowed here")
    return size


def decode(payload: bytes) -> Message:
    """The message in a frame, without its header.

    Raises:
        ProtocolError: there is none.
    """
    try:
        values = msgpack.unpackb(payload, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError(f"not msgpack: {type(error).__name__}") from error
    if not isinstance(values, list) or not values or type(values[0]) is not int:
        raise ProtocolError("a message is an array that begins with its number")
    if values[0] not in _MESSAGES:
        raise ProtocolError(f"unknown message number {values[0]}")
    kind, checks = _MESSAGES[values[0]]
    if len(values) - 1 != len(checks):
        raise ProtocolError(f"{kind.__name__} has {len(checks)} fields, got {len(values) - 1}")
    try:
        fields = [check(value) for check, value in zip(checks, values[1:], strict=True)]
    except (TypeError, ValueError) as error:  # ConfigError is a ValueError
        raise ProtocolError(f"bad {kind.__name__}: {error}") from error
    message: Message = kind(*fields)
    return message


def _pack(message: Message) -> list[Any]:
    match message:
        case Open(session, epoch, tokens, num_prompt, s, vocab_size, depth):
            sampling = [getattr(s, name) for name in _SAMPLING]
            sampling[_STOP_IDS] = sorted(s.stop_ids)
            return [session, epoch, tokens, num_prompt, sampling, vocab_size, depth]
        case Draft(session, epoch, base, tree):
            return [session, epoch, base, [tree.tokens, tree.parents, tree.scores]]
        case _:
            return [getattr(message, name) for name in message.__slots__]


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"expected an integer between {low} and {high}")
        return value

    return check


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError("expected a number")
    return float(value)


def _bytes(value: Any) -> bytes:
    if type(value) is not bytes or len(value) > 64:
        raise TypeError("expected at most 64 bytes")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > 1000:
        raise TypeError("expected a text of at most 1000 characters")
    return value


_count = _integer(0, 2**53)
_token = _integer(0, 2**31 - 1)
_parent = _integer(-1, MAX_NODES)
_depth = _integer(1, MAX_DEPTH)
_seed = _integer(-(2**63), 2**63 - 1)


def _tokens(value: Any) -> tuple[int, ...]:
    if type(value) is not list:
        raise TypeError("expected an array of token ids")
    return tuple(_token(token) for token in value)


def _pairs(value: Any) -> tuple[tuple[int, float], ...]:
    if type(value) is not list or any(type(one) is not list or len(one) != 2 for one in value):
        raise TypeError("expected an array of pairs")
    return tuple((_token(token), _number(bias)) for token, bias in value)


_SAMPLING: dict[str, Callable[[Any], Any]] = {
    "temperature": _number,
    "top_k": _count,
    "top_p": _number,
    "min_p": _number,
    "repetition_penalty": _number,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "logit_bias": _pairs,
    "min_tokens": _count,
    "stop_ids": _tokens,
    "seed": _seed,
    "choice": _count,
    "typical": _number,
}
_STOP_IDS = list(_SAMPLING).index("stop_ids")


def _sampling(value: Any) -> Sampling:
    if type(value) is not list or len(value) != len(_SAMPLING):
        raise TypeError(f"expected the {len(_SAMPLING)} values of a Sampling")
    checked = {
        name: check(one) for (name, check), one in zip(_SAMPLING.items(), value, strict=True)
    }
    return Sampling(**checked)


def _tree(value: Any) -> TokenTree:
    if type(value) is not list or len(value) != 3 or any(type(one) is not list for one in value):
        raise TypeError("expected token ids, their parents and their scores")
    if len(value[1]) > MAX_NODES:
        raise ValueError(f"a tree of {len(value[1])} nodes; at most {MAX_NODES} are allowed")
    tokens, parents, scores = value
    return TokenTree(_tokens(tokens), tuple(map(_parent, parents)), tuple(map(_number, scores)))


_MESSAGES: dict[int, tuple[type[Any], tuple[Callable[[Any], Any], ...]]] = {
    1: (Challenge, (_count, _bytes)),
    2: (Hello, (_count, _bytes, _bytes)),
    3: (Welcome, (_bytes,)),
    4: (Open, (_count, _count, _tokens, _count, _sampling, _count, _depth)),
    5: (Commit, (_count, _count, _count, _tokens, _depth)),
    6: (Draft, (_count, _count, _count, _tree)),
    7: (Close, (_count,)),
    8: (Heartbeat, ()),
    9: (GoAway, ()),
    10: (Error, (_count, _count, _text, _text)),
}
_NUMBERS = {kind: number for number, (kind, _) in _MESSAGES.items()}
