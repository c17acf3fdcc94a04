"""Decode states of many texts, a row each. Knows rows; knows nothing of what their keys stand for.

Texts at work have the first rows, so that a pass over them reads the states where they lie.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from transformers import PreTrainedModel

from linearized.models import new_state
from linearized.state import DecodeState

Key = TypeVar("Key", bound=Hashable)


class Pool(Generic[Key]):
    """Rows are allocated once and used by texts that come and go; more are allocated only if all
    are in use. Each costs the same bytes, unless some layers keep softmax."""

    def __init__(self, model: PreTrainedModel, rows: int = 1) -> None:
        self._model = model
        self._state = new_state(model, rows)
        self._empty = new_state(model)
        self.keys: list[Key] = []
        """Of the rows in use, in their order."""

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: Key) -> bool:
        return key in self.keys

    @property
    def num_rows(self) -> int:
        """In use or not."""
        return self._state.batch_size

    def bytes_at(self, num_tokens: int) -> int:
        """What all rows take when the longest text has so many tokens."""
        state, history = self._state, self._state.history
        if history is None:
            return state.nbytes
        return state.nbytes - history.nbytes + history.bytes_at(num_tokens)

    def first(self, count: int) -> DecodeState:
        """Views of the first rows."""
        return self._state.rows(0, count)

    def row(self, key: Key) -> DecodeState:
        """A view of one."""
        index = self.keys.index(key)
        return self._state.rows(index, index + 1)

    def add(self, key: Key, state: DecodeState | None = None) -> None:
        """A row for this key, behind the others, with a copy of `state` [1 row], or empty."""
        if len(self.keys) == self.num_rows:
            self.grow(2 * self.num_rows)
        index = len(self.keys)
        self._state.rows(index, index + 1).copy_(self._empty if state is None else state)
        self.keys.append(key)

    def grow(self, rows: int) -> None:
        """Have so many rows, if there are fewer."""
        if rows <= self.num_rows:
            return
        grown = new_state(self._model, rows)
        if grown.history is not None and self._state.history is not None:
            grown.history.reserve(self._state.history.keys.shape[3])
        grown.rows(0, self._state.batch_size).copy_(self._state)
        self._state = grown

    def clear(self, key: Key) -> None:
        """Its row holds no tokens any more."""
        self.row(key).copy_(self._empty)

    def remove(self, key: Key) -> None:
        """The last row takes its place."""
        index, last = self.keys.index(key), len(self.keys) - 1
        if index != last:
            self._state.rows(index, index + 1).copy_(self._state.rows(last, last + 1))
            self.keys[index] = self.keys[last]
        self.keys.pop()

    def rows(self, start: int, stop: int) -> DecodeState:
        """Views of neighbouring rows."""
        return self._state.rows(start, stop)

    def arrange(self, keys: Sequence[Key], *, start: int = 0) -> list[Key]:
        """Bring the rows of `keys` to the front, or behind the first `start` rows, none of which
        is theirs. Returns the keys in the order that they have there."""
        wanted = set(keys)
        stop = start + len(keys)
        for index in range(start, stop):
            if self.keys[index] not in wanted:
                other = next(i for i in range(index + 1, len(self)) if self.keys[i] in wanted)
                self._swap(index, other)
        return self.keys[start:stop]

    def reserve(self, num_tokens: int) -> None:
        """Make room for texts of so many tokens, where some layers keep softmax."""
        if self._state.history is not None:
            self._state.history.reserve(num_tokens)

    def ahead(self, num_tokens: int) -> None:
        """Make room for texts that get longer by so many tokens, and some more."""
        history = self._state.history
        if history is not None and self.keys:
            assert history.filled is not None
            size = int(history.filled[: len(self)].max()) + num_tokens + 1
            if size > history.keys.shape[3]:
                history.reserve(2 * size)

    def _swap(self, one: int, other: int) -> None:
        first, second = (self._state.rows(i, i + 1) for i in (one, other))
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
        self.keys[one], self.keys[other] = self.keys[other], self.keys[one]
