"""Values from a network, checked one by one before anything is made of them. Knows no message.

A Field says how one field of a message is written in msgpack and how it is read. What is read is
checked for type and size; a TypeError or ValueError says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from linearized.speculative import Alternatives, Sampling, TokenTree

MAX_TOKEN = 2**31 - 1
MAX_ALTERNATIVES = 1024
"""Named for one token."""
MAX_NODES = 256
"""Of a tree."""


def _as_it_is(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Field:
    read: Callable[[Any], Any]
    """From what msgpack gave."""
    write: Callable[[Any], Any] = _as_it_is
    """To what msgpack takes."""


def integer(low: int, high: int) -> Field:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"expected an integer between {low} and {high}")
        return value

    return Field(check)


def string(longest: int) -> Field:
    def check(value: Any) -> str:
        if type(value) is not str or len(value) > longest:
            raise TypeError(f"expected a text of at most {longest} characters")
        return value

    return Field(check)


def blob(longest: int) -> Field:
    def check(value: Any) -> bytes:
        if type(value) is not bytes or len(value) > longest:
            raise TypeError(f"expected at most {longest} bytes")
        return value

    return Field(check)


def choice(*allowed: str) -> Field:
    def check(value: Any) -> str:
        if value not in allowed or type(value) is not str:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return value

    return Field(check)


def optional(field: Field) -> Field:
    return Field(
        lambda value: None if value is None else field.read(value),
        lambda value: None if value is None else field.write(value),
    )


def several(field: Field, most: int) -> Field:
    """A tuple of up to so many."""

    def read(value: Any) -> tuple[Any, ...]:
        return tuple(map(field.read, array(value, most)))

    return Field(read, lambda values: [field.write(one) for one in values])


def record(make: Callable[..., Any], fields: dict[str, Field]) -> Field:
    """An object made from keywords, on the wire as the array of its fields."""

    def read(value: Any) -> Any:
        if type(value) is not list or len(value) != len(fields):
            name = getattr(make, "__name__", "record")
            raise TypeError(f"expected the {len(fields)} values of a {name}")
        pairs = zip(fields.items(), value, strict=True)
        return make(**{name: field.read(one) for (name, field), one in pairs})

    def write(value: Any) -> list[Any]:
        return [field.write(getattr(value, name)) for name, field in fields.items()]

    return Field(read, write)


def array(value: Any, most: int) -> list[Any]:
    if type(value) is not list:
        raise TypeError("expected an array")
    if len(value) > most:
        raise ValueError(f"an array of {len(value)}; at most {most} are allowed")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError("expected a number")
    return float(value)


def _tokens(value: Any) -> tuple[int, ...]:
    """Of any length: the frame is bounded. A prompt may have many, so there is no call for each."""
    if type(value) is not list:
        raise TypeError("expected an array of token ids")
    if value and (set(map(type, value)) != {int} or min(value) < 0 or max(value) > MAX_TOKEN):
        raise ValueError(f"expected token ids, each an integer between 0 and {MAX_TOKEN}")
    return tuple(value)


def _pairs(value: Any) -> tuple[tuple[int, float], ...]:
    if type(value) is not list or any(type(one) is not list or len(one) != 2 for one in value):
        raise TypeError("expected an array of pairs")
    return tuple((TOKEN.read(token), _number(bias)) for token, bias in value)


def _alternatives(value: Any) -> Alternatives:
    if type(value) is not list or len(value) != 3 or type(value[2]) is not list:
        raise TypeError("expected a log-probability, token ids, and one for each of them")
    ids, numbers = _tokens(value[1]), tuple(map(_number, array(value[2], MAX_ALTERNATIVES)))
    return Alternatives(_number(value[0]), tuple(zip(ids, numbers, strict=True)))


def _pack_alternatives(value: Alternatives) -> list[Any]:
    return [value.logprob, [token for token, _ in value.top], [number for _, number in value.top]]


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError("expected true or false")
    return value


def _tree(value: Any) -> TokenTree:
    if type(value) is not list or len(value) != 3 or any(type(one) is not list for one in value):
        raise TypeError("expected token ids, their parents and their scores")
    if len(value[1]) > MAX_NODES:
        raise ValueError(f"a tree of {len(value[1])} nodes; at most {MAX_NODES} are allowed")
    tokens, parents, scores = value
    return TokenTree(
        _tokens(tokens), tuple(map(_PARENT.read, parents)), tuple(map(_number, scores))
    )


def _pack_tree(tree: TokenTree) -> list[Any]:
    return [tree.tokens, tree.parents, tree.scores]


COUNT = integer(0, 2**53)
TOKEN = integer(0, MAX_TOKEN)
TOKENS = Field(_tokens)
NUMBER = Field(_number)
BYTES = blob(64)
"""A nonce or a proof."""
TEXT = string(1000)
ALTERNATIVES = Field(_alternatives, _pack_alternatives)
FLAG = Field(_flag)
_PARENT = integer(-1, MAX_NODES)
TREE = Field(_tree, _pack_tree)
SAMPLING = record(
    Sampling,
    {
        "temperature": NUMBER,
        "top_k": COUNT,
        "top_p": NUMBER,
        "min_p": NUMBER,
        "repetition_penalty": NUMBER,
        "presence_penalty": NUMBER,
        "frequency_penalty": NUMBER,
        "logit_bias": Field(_pairs),
        "min_tokens": COUNT,
        "stop_ids": Field(_tokens, sorted),
        "seed": integer(-(2**63), 2**63 - 1),
        "choice": COUNT,
        "typical": NUMBER,
    },
)
