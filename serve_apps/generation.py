"""What crosses between the ingress and a target replica: one text asked for, and its events.

Plain data. A target answers with Refused, or with Started, any number of Deltas and Finished.
"""

from __future__ import annotations

from dataclasses import dataclass

from linearized.speculative import Sampling

SPECULATE = ("model", "ngram", "none")
"""Where guesses come from: the draft replica (n-grams while it does not answer), the text itself,
or nowhere. The speed depends on it, the text does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    prompt: str | tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    echo: bool = False
    speculate: str | None = None
    """One of SPECULATE; None: the first of them that the app has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    prompt_tokens: int
    prompt_text: str
    """Empty unless the prompt is to be echoed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What one round gave."""

    text: str
    """May be empty: half a character or the beginning of a stop string is held back."""
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    reason: str
    """`stop`: the end of the text or a stop string; `length`: max_tokens."""
    completion_tokens: int
    accepted: int
    """Drafted tokens that are in the text."""
    rejected: int
    rounds: int
    """Verifications by the target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """Nothing is generated; says why, to the user."""

    status: int
    """As HTTP has it."""
    message: str
    code: str
    param: str | None = None
    retry_after: int | None = None
    """Seconds."""


Event = Started | Delta | Finished | Refused


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What a target replica is."""

    fingerprint: str
    vocab_size: int
    draft: str
    """`none`, `connected` or `away`."""
