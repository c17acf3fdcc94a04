"""What softmax attention remembers: all keys and values so far, in pages. Knows tensors; knows
nothing of tokens.

S softmax layers, B rows, K key/value heads, C room in tokens, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

PAGE = 256
"""Tokens by which the room of a history grows."""
GROWTH = 16 * PAGE
"""Tokens at most that room is made for before they are there."""


class History:
    """Keys and values of the layers that keep softmax: the part of a hybrid's state that grows.
    Row b holds `DecodeState.length[b]` tokens; what lies beyond them means nothing. Its room is
    some whole pages, and whoever reads it masks by length."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        filled: Tensor | None = None,
        part: tuple[History, int, int] | None = None,
    ) -> None:
        """`keys` [S, B, K, C, D] and `values` [S, B, K, C, E], for S softmax layers, with room for
        C tokens. `filled` [B], int64, on the CPU: at least as many tokens as each row holds, known
        without asking a GPU; None: all of the room is looked at. `part`: of which history these
        are the rows from the first to before the second."""
        self._keys = keys
        self._values = values
        self.filled = filled
        self._part = part

    @property
    def keys(self) -> Tensor:
        """[S, B, K, C, D]."""
        if self._part is None:
            return self._keys
        whole, start, stop = self._part
        return whole.keys[:, start:stop]

    @property
    def values(self) -> Tensor:
        """[S, B, K, C, E]."""
        if self._part is None:
            return self._values
        whole, start, stop = self._part
        return whole.values[:, start:stop]

    def rows(self, start: int, stop: int) -> History:
        """Some neighbouring rows. Whoever writes them, or makes room for them, does so in the
        whole."""
        filled = None if self.filled is None else self.filled[start:stop]
        return History(self._keys, self._values, filled, (self, start, stop))

    @classmethod
    def empty(
        cls,
        layers: int,
        rows: int,
        heads: int,
        key_width: int,
        value_width: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> History:
        """Without any room."""
        shape = (layers, rows, heads, 0)
        return cls(
            torch.zeros(*shape, key_width, dtype=dtype, device=device),
            torch.zeros(*shape, value_width, dtype=dtype, device=device),
            torch.zeros(rows, dtype=torch.int64),
        )

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def bytes_at(self, num_tokens: int) -> int:
        """What it takes when the longest row has so many tokens."""
        layers, rows, heads, _, width = self.keys.shape
        each = layers * rows * heads * (width + self.values.shape[4]) * self.keys.itemsize
        return _pages(num_tokens) * each

    @property
    def room(self) -> int:
        """C."""
        return self.keys.shape[3]

    @property
    def size(self) -> int:
        """Tokens that have to be looked at: those of the longest row, rounded up to pages; a page
        at least, where there is room for it."""
        if self.filled is None:
            return self.room
        longest = int(self.filled.max()) if len(self.filled) else 0
        return min(max(_pages(longest), PAGE), self.room)

    def layer(self, slot: int) -> tuple[Tensor, Tensor]:
        """Keys [B, K, C', D] and values [B, K, C', E] of one layer, as far as any row has some."""
        size = self.size
        return self.keys[slot, :, :, :size], self.values[slot, :, :, :size]

    def view(self) -> History:
        """The same, without the pages that no row has reached."""
        size = self.size
        return History(self.keys[:, :, :, :size], self.values[:, :, :, :size], self.filled)

    def copy_(self, other: History) -> None:
        """What another of as many rows holds."""
        assert self.filled is not None and other.filled is not None
        size, before = other.size, self.size
        self.reserve(size)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[:, :, :, :size].copy_(theirs[:, :, :, :size])
            mine[:, :, :, size:before].zero_()  # a number that is none would still be one
        self.filled.copy_(other.filled)

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        length: Tensor,
        mask: Tensor | None,
        counts: Sequence[int] | None = None,
    ) -> None:
        """Add [S, B, K, T, ·] after each row's `length` [B], those that `mask` [B, T] keeps.
        `counts` [B] says how many these are, where it is known."""
        assert self.filled is not None
        num_tokens = keys.shape[3]
        if counts is None and mask is not None and not mask.is_cuda:
            counts = mask.sum(1).tolist()
        added = torch.tensor(counts) if counts is not None else num_tokens
        needed = int((self.filled + added).max()) + (mask is not None)
        if needed > self.room:  # and some more, so that a growing text is not copied page by page
            self.reserve(max(needed, min(2 * self.room, self.room + GROWTH)))
        ranks = torch.arange(num_tokens, device=length.device).expand(len(length), -1)
        if mask is not None:
            ranks = mask.long().cumsum(1) - 1
        slots = length[:, None] + ranks  # B T
        if mask is not None:  # what is left out goes to the last place, which no row has reached
            slots = torch.where(mask.bool(), slots, self.room - 1)
        for whole, new in ((self.keys, keys), (self.values, values)):
            index = slots[None, :, None, :, None].expand_as(new)
            if mask is not None:  # a number that is none would still be one
                new = new.masked_fill(~mask.bool()[None, :, None, :, None], 0)
            whole.scatter_(3, index, new.to(whole.dtype))
        self.filled += added

    @torch.inference_mode(False)
    def reserve(self, size: int) -> None:
        """Make room for this many tokens, in whole pages, in all rows of the whole. One more place
        is left between two heads: so views of some pages and of all lie alike in memory, and one
        compiled program is for both."""
        if self._part is not None:
            self._part[0].reserve(size)
            return
        room = _pages(size)
        more = room - self.room
        if more > 0:
            with torch.no_grad():
                self._keys = F.pad(self._keys, (0, 0, 0, more + 1))[:, :, :, :room]
                self._values = F.pad(self._values, (0, 0, 0, more + 1))[:, :, :, :room]


def _pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE) * PAGE
