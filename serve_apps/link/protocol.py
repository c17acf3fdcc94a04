"""What crosses the link: messages and their bytes.

A frame is a length (4 bytes, big-endian) and a msgpack array of messages, each of them an array:
the message's number, then its fields. Bytes come from a network and are checked one by one. Knows
no socket and no model.

    listener  Challenge ->                     a nonce
    dialer    <- Hello                         proof that it knows the secret, a nonce of its own
    listener  Welcome ->                       proof that it knows the secret too
    both      Heartbeat
    listener  GoAway ->

Between a target, which dials, and a draft replica:

    target    Open, Commit, Close ->           one text each; any number side by side
    draft     <- Draft, Error

Between the ingress, which dials, and a target, see `serve_apps.link.texts`.

What goes to a draft may be lost, repeated or late: `base` says how many tokens a message builds on,
`epoch` counts how often a session was opened, and whatever does not fit is ignored. A commit that
the draft cannot place is answered by an Error, and the target opens the session anew with all its
tokens.

Open and Commit ask for a tree. The draft answers as soon as it is as deep as was asked for, goes on
drafting below it while the target verifies, and sends what has become of it, for the same base. The
part of it behind the tokens that the target has chosen since is a tree for the text as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from linearized.errors import LinearizedError
from linearized.speculative import Sampling, TokenTree
from serve_apps.link import texts
from serve_apps.link.wire import BYTES, COUNT, SAMPLING, TEXT, TOKENS, TREE, Field, integer

VERSION = 5
HEADER = 4
MAX_FRAME = 8 * 2**20
"""Bytes after the header; an Open with 1.6 million tokens."""
MAX_MESSAGE = MAX_FRAME - 8
MAX_HANDSHAKE = 512
"""Bytes that a peer may send before it has shown that it knows the secret."""
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
    """Where a replica listens. Travels through a Serve handle, inside the cluster."""

    host: str
    port: int
    secret: bytes
    """Made for this replica. Who has not been told it is a stranger there."""
    fingerprint: str
    """Of its model."""
    vocab_size: int
    tokenizer: str = ""
    """A hash of it; empty: it has none, or does not say."""
    path: str = ""
    """The same as a Unix socket, for who is on its machine; empty: there is none."""

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
    """The replica is about to end; look for another one."""


@dataclass(frozen=True, slots=True)
class Error:
    session: int
    epoch: int
    code: str
    message: str


Message = (
    Challenge
    | Hello
    | Welcome
    | Open
    | Commit
    | Draft
    | Close
    | Heartbeat
    | GoAway
    | Error
    | texts.Submit
    | texts.Cancel
    | texts.More
    | texts.Said
    | texts.PromptPart
    | texts.Leave
    | texts.Lend
    | texts.Lent
    | texts.StatePart
    | texts.Failed
    | texts.Status
)


def encode(*messages: Message) -> bytes:
    """A whole frame.

    Raises:
        ProtocolError: it is longer than a frame may be.
    """
    return frame([pack(message) for message in messages])


def pack(message: Message) -> bytes:
    """A message, without a frame.

    Raises:
        ProtocolError: no frame is long enough for it.
    """
    number, fields = _NUMBERS[type(message)]
    values = zip(fields, message.__slots__, strict=True)
    packed: bytes = msgpack.packb(
        [number, *(field.write(getattr(message, name)) for field, name in values)]
    )
    if len(packed) > MAX_MESSAGE:
        size = len(packed)
        raise ProtocolError(f"a message of {size} bytes; at most {MAX_MESSAGE} fit a frame")
    return packed


def frame(packed: Sequence[bytes]) -> bytes:
    """Of messages that fit it together."""
    payload = b"".join((msgpack.Packer().pack_array_header(len(packed)), *packed))
    if len(payload) > MAX_FRAME:
        raise ProtocolError(f"a frame of {len(payload)} bytes; at most {MAX_FRAME} are allowed")
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


def decode(payload: bytes) -> list[Message]:
    """The messages in a frame, without its header.

    Raises:
        ProtocolError: one of them is none.
    """
    try:
        values = msgpack.unpackb(payload, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError(f"not msgpack: {type(error).__name__}") from error
    if not isinstance(values, list):
        raise ProtocolError("a frame is an array of messages")
    return [_message(one) for one in values]


def _message(values: Any) -> Message:
    if not isinstance(values, list) or not values or type(values[0]) is not int:
        raise ProtocolError("a message is an array that begins with its number")
    if values[0] not in _MESSAGES:
        raise ProtocolError(f"unknown message number {values[0]}")
    kind, fields = _MESSAGES[values[0]]
    if len(values) - 1 != len(fields):
        raise ProtocolError(f"{kind.__name__} has {len(fields)} fields, got {len(values) - 1}")
    try:
        found = [field.read(value) for field, value in zip(fields, values[1:], strict=True)]
        message: Message = kind(*found)
    except (TypeError, ValueError) as error:  # ConfigError is a ValueError
        raise ProtocolError(f"bad {kind.__name__}: {error}") from error
    return message


_DEPTH = integer(1, MAX_DEPTH)
_FIELDS: dict[type[Any], tuple[Field, ...]] = {
    Challenge: (COUNT, BYTES),
    Hello: (COUNT, BYTES, BYTES),
    Welcome: (BYTES,),
    Open: (COUNT, COUNT, TOKENS, COUNT, SAMPLING, _DEPTH),
    Commit: (COUNT, COUNT, COUNT, TOKENS, _DEPTH),
    Draft: (COUNT, COUNT, COUNT, TREE),
    Close: (COUNT,),
    Heartbeat: (),
    GoAway: (),
    Error: (COUNT, COUNT, TEXT, TEXT),
    **texts.FIELDS,
}
_MESSAGES = dict(enumerate(_FIELDS.items(), start=1))
_NUMBERS = {kind: (number, fields) for number, (kind, fields) in _MESSAGES.items()}
