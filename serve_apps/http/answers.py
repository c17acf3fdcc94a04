"""OpenAI's answers: whole bodies, chunks of streams, usage, log-probabilities. Knows no server."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from linearized.speculative import Alternatives
from serve_apps.generation import Delta, Finished, Started
from serve_apps.http.choices import Entry, Part, Round
from serve_apps.http.tokens import Tokenizer

LEAST = -9999.0
"""Stands for the logarithm of 0, as with OpenAI: JSON has no infinity."""
DONE = "data: [DONE]\n\n"
PIECE = 256
"""Values of a list that are encoded at a time."""
_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""Characters at which clients split lines that know Unicode's line breaks."""


def event(body: Any) -> str:
    """A server-sent event."""
    return f"data: {_encoded(body)}\n\n"


def written(body: Any) -> str:
    """JSON, a piece at a time: nothing else runs in the process while one is encoded."""
    return "".join(_pieces(body))


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for i, (name, one) in enumerate(value.items()):
            yield f"{',' if i else '{'}{_encoded(name)}:"
            yield from _pieces(one)
        yield "}" if value else "{}"
    elif isinstance(value, list | tuple) and len(value) > PIECE:
        for at in range(0, len(value), PIECE):
            yield f"{',' if at else '['}{_encoded(value[at : at + PIECE])[1:-1]}"
        yield "]"
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield "," if i else "["
            yield from _pieces(one)
        yield "]" if value else "[]"
    else:
        yield _encoded(value)


def _encoded(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text if text.isascii() else text.translate(_BREAKS)


class Usage:
    """Counts the tokens of one answer, over all its choices."""

    def __init__(self, *, prompt: int) -> None:
        """`prompt`: tokens of all prompts, each counted once."""
        self.prompt = prompt
        self.cached = self.completion = self.rounds = 0
        self._drafted: list[int] = []
        self._accepted: list[int] = []

    def start(self, started: Started) -> None:
        """Of each prompt's first choice."""
        self.cached += started.cached_tokens

    def add(self, delta: Delta) -> None:
        self.completion += len(delta.tokens)

    def finish(self, finished: Finished) -> None:
        self.rounds += finished.rounds
        self._drafted = _sums(self._drafted, finished.drafted)
        self._accepted = _sums(self._accepted, finished.accepted)

    def body(self) -> dict[str, Any]:
        accepted = sum(self._accepted)
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": sum(self._drafted) - accepted,
                "verification_rounds": self.rounds,
                "drafted_by_depth": self._drafted,
                "accepted_by_depth": self._accepted,
            },
        }


def _sums(one: Sequence[int], other: Sequence[int]) -> list[int]:
    size = max(len(one), len(other))
    padded = [[*counts, *[0] * (size - len(counts))] for counts in (one, other)]
    return [a + b for a, b in zip(*padded, strict=True)]


class Answer:
    """Writes one answer, whole or in chunks. All of its chunks have one id."""

    PREFIX: str
    WHOLE: str
    CHUNK: str
    """`id` begins with PREFIX; WHOLE and CHUNK are what OpenAI calls `object`."""

    def __init__(
        self,
        model: str,
        fingerprint: str,
        seed: int,
        *,
        tokenizer: Tokenizer,
        logprobs: bool,
        with_usage: bool = False,
    ) -> None:
        """`with_usage`: every chunk has a `usage`, which is null in all but the last."""
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._with_usage = with_usage
        self._head = {
            "id": f"{self.PREFIX}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
            "seed": seed,
        }

    def body(self, choices: Sequence[Part], usage: Usage) -> str:
        found = [self._whole(choice) for choice in choices]
        return written(
            {**self._head, "object": self.WHOLE, "choices": found, "usage": usage.body()}
        )

    def opening(self, indices: int) -> list[str]:
        """Events before all others."""
        return []

    def chunk(self, part: Part) -> str:
        choice = self._chunk(part)
        if part.read is not None:
            tokens, cached = part.read
            choice["prompt"] = {"tokens": tokens, "cached_tokens": cached}
        if part.round is not None:
            choice["round"] = self._round(part.round)
        return self._event([choice])

    def long_chunk(self, part: Part) -> str:
        """The same, without stopping other threads for long."""
        return f"data: {written(self._body([self._chunk(part)], None))}\n\n"

    def ending(self, usage: Usage) -> list[str]:
        """Events after all others."""
        last = [self._event([], usage.body())] if self._with_usage else []
        return [*last, DONE]

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        return event(self._body(choices, usage))

    def _body(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        body = {**self._head, "object": self.CHUNK, "choices": choices}
        return {**body, "usage": usage} if self._with_usage else body

    def _round(self, found: Round) -> dict[str, Any]:
        """Ours: where each token begins, and whether it was drafted; and the tree of guesses, with
        the nodes that are in the text."""
        tokens = [
            {"offset": entry.offset, "drafted": number < found.accepted}
            for number, entry in enumerate(found.entries)
        ]
        taken = [entry.token for entry in found.entries[: found.accepted]]
        tree = {
            "tokens": [self._tokenizer.name(token)[0] for token in found.tree.tokens],
            "parents": list(found.tree.parents),
            "accepted": found.tree.follow(taken),
        }
        return {"tokens": tokens, "tree": tree}

    def _whole(self, part: Part) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, part: Part) -> dict[str, Any]:
        raise NotImplementedError


class CompletionAnswer(Answer):
    PREFIX = "cmpl"
    WHOLE = CHUNK = "text_completion"

    def _whole(self, part: Part) -> dict[str, Any]:
        return self._choice(part, self._logprobs)

    def _chunk(self, part: Part) -> dict[str, Any]:
        return self._choice(part, self._logprobs and bool(part.entries))

    def _choice(self, part: Part, logprobs: bool) -> dict[str, Any]:
        return {
            "index": part.index,
            "text": part.text,
            "logprobs": self._found(part.entries) if logprobs else None,
            "finish_reason": part.reason,
        }

    def _found(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return {
            "tokens": [self._tokenizer.name(entry.token)[0] for entry in entries],
            "token_logprobs": [e.found and _finite(e.found.logprob) for e in entries],
            "top_logprobs": [e.found and self._top(e.token, e.found) for e in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def _top(self, token: int, found: Alternatives) -> dict[str, float]:
        """By name, the most probable first. The token itself is always there, as with OpenAI."""
        top: dict[str, float] = {}
        for one, logprob in (*found.top, (token, found.logprob)):
            top.setdefault(self._tokenizer.name(one)[0], _finite(logprob))
        return top


class ChatAnswer(Answer):
    PREFIX = "chatcmpl"
    WHOLE = "chat.completion"
    CHUNK = "chat.completion.chunk"

    def opening(self, indices: int) -> list[str]:
        first = {"role": "assistant", "content": "", "refusal": None}
        return [
            self._event([{"index": i, "delta": first, "logprobs": None, "finish_reason": None}])
            for i in range(indices)
        ]

    def _whole(self, part: Part) -> dict[str, Any]:
        return {
            "index": part.index,
            "message": {"role": "assistant", "content": part.text, "refusal": None},
            "logprobs": self._found(part.entries) if self._logprobs else None,
            "finish_reason": part.reason,
        }

    def _chunk(self, part: Part) -> dict[str, Any]:
        return {
            "index": part.index,
            "delta": {"content": part.text} if part.text else {},
            "logprobs": self._found(part.entries) if part.entries else None,
            "finish_reason": part.reason,
        }

    def _found(self, entries: Sequence[Entry]) -> dict[str, Any]:
        content = []
        for entry in entries:
            assert entry.found is not None
            top = [self._token(*one) for one in entry.found.top]
            content.append({**self._token(entry.token, entry.found.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        name, spelt = self._tokenizer.name(token)
        return {"token": name, "logprob": _finite(logprob), "bytes": list(spelt)}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
