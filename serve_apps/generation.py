"""What crosses between the ingress and a target replica: one text asked for, and its events.

Plain data: token ids go in, text and token ids come out. A target answers with Refused, or with
Started, any number of Deltas and Finished, or Left if it was asked to stop. What the ingress keeps
of these is enough to go on with the text on another replica.
"""

from __future__ import annotations

from dataclasses import dataclass

from linearized.speculative import Alternatives, Sampling, TokenTree

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
    prompt: tuple[int, ...]
    text: tuple[int, ...] = ()
    """What the text has so far, if it comes from another replica. Events are about what follows."""
    max_tokens: int
    """Of the text, with what it has so far."""
    sampling: Sampling
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """Alternatives that are named for each token; None: no log-probabilities at all."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    guide: Guide | None = None
    speculate: str | None = None
    """One of SPECULATE. None means the first of them that the app has."""
    trees: bool = False
    """Whether Deltas name what was drafted."""
    owner: str = ""
    """Whose prefixes it may go on from: those of texts with an equal owner."""
    request: str = ""
    """The request that it belongs to, for logs."""
    state: bytes = b""
    """What another replica handed over: a state that has read some of prompt and text. Empty: they
    are read from the start, or from the longest prefix that is known."""
    lent: bytes = b""
    """A prefix that another replica knows (see `Prefixes.export`), to be known here, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """The prompt has been read."""

    cached_tokens: int = 0
    """Tokens of the prompt that did not have to be read, as their state was known."""
    prompt_logprobs: tuple[Alternatives | None, ...] = ()
    """One for each token of the prompt, if they were asked for; the first is None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """The text and tokens that one round gave."""

    text: str
    """New text. It may be empty, as half a character or the beginning of a stop string is held
    back."""
    tokens: tuple[int, ...]
    accepted: int = 0
    """How many of the tokens, from the first on, were drafted."""
    logprobs: tuple[Alternatives, ...] = ()
    """One for each token, if they were asked for."""
    tree: TokenTree = TokenTree.empty
    """The guesses that the round verified, if they were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    reason: str
    """`stop`: the end of the text or a stop string; `length`: max_tokens; `error`: see there."""
    drafted: tuple[int, ...] = ()
    """Number of drafted tokens on the first, second, … level."""
    accepted: tuple[int, ...] = ()
    """Those of them that are in the text."""
    rounds: int
    """Number of verifications by the target."""
    error: str = ""
    """What went wrong with this text, in words for the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Left:
    """The replica was asked to stop here; another one may go on."""

    state: bytes = b""
    """For its Generation."""


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


Event = Started | Delta | Finished | Left | Refused


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """Describes a target replica."""

    fingerprint: str
    vocab_size: int
    max_context: int
    """Largest number of tokens of prompt and text together."""
    draft: str
    """State of the draft: `none`, `connected` or `away`."""
    texts: int = 0
    """Texts in progress or waiting."""
    room: int = 1
    """Texts that it goes on with at a time."""
    state_bytes: int = 0
    """Of one text's state, …"""
    state_token_bytes: int = 0
    """… and what each token adds to it, where some layers keep softmax."""
    cache_token_bytes: int = 0
    """What each token adds to a softmax model's cache of keys and values."""
