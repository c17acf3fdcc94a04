"""What crosses between the ingress and a target replica: one text asked for, and its events.

Plain data. A target answers with Refused, or with Started, any number of Deltas and Finished.
"""

from __future__ import annotations

from dataclasses import dataclass

from linearized.speculative import Sampling

SPECULATE = ("model", "ngram", "none")
"""Where guesses come from: the draft replica (n-grams while it does not answer), the text itself,
or nowhere. The speed depends on it, the text does not."""
GUIDES = ("json", "json_schema", "regex", "grammar", "choice")
"""Kinds of rules that a text can be bound to."""


@dataclass(frozen=True, slots=True)
class Guide:
    """A rule that the text obeys."""

    kind: str
    """One of GUIDES."""
    source: str = ""
    """The schema, the expression or the grammar; of `choice`, a JSON array of texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    prompt: str | tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    echo: bool = False
    guide: Guide | None = None
    speculate: str | None = None
    """One of SPECULATE. None means the first of them that the app has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    prompt_tokens: int
    prompt_text: str
    """The prompt's text if it is to be echoed, otherwise empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """The text and tokens that one round gave."""

    text: str
    """New text. It may be empty, as half a character or the beginning of a stop string is held
    back."""
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    reason: str
    """`stop`: the end of the text or a stop string; `length`: max_tokens."""
    completion_tokens: int
    accepted: int
    """Number of drafted tokens that were accepted."""
    rejected: int
    rounds: int
    """Number of verifications by the target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """Says that nothing is generated, and why, in words for the user."""

    status: int
    """The status code of HTTP."""
    message: str
    code: str
    param: str | None = None
    retry_after: int | None = None
    """Seconds after which the client may try again."""


Event = Started | Delta | Finished | Refused


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """Describes a target replica."""

    fingerprint: str
    vocab_size: int
    draft: str
    """State of the draft: `none`, `connected` or `away`."""
