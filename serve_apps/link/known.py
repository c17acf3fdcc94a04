"""What a target replica has read, as far as the ingress knows that sent it there. Knows token ids;
knows no socket.

The replica may have forgotten some of it since: what is known here says whom to ask, no more.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MOST_TEXTS = 256
MOST_TOKENS = 2**20
"""In all texts together; those that were read longest ago are forgotten first."""


class Known:
    """The texts of one replica."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, bytes], NDArray[np.int32]] = {}
        """By owner and ids, in the order in which they were read."""
        self._num_tokens = 0

    def note(self, tokens: Sequence[int], owner: str) -> None:
        """It has read these, and keeps the state behind them."""
        ids = _ids(tokens)
        key = owner, ids.tobytes()
        if self._texts.pop(key, None) is None:
            self._num_tokens += len(ids)
        self._texts[key] = ids
        while len(self._texts) > MOST_TEXTS or self._num_tokens > MOST_TOKENS:
            self._num_tokens -= len(self._texts.pop(next(iter(self._texts))))

    def spares(self, tokens: Sequence[int], owner: str) -> int:
        """How many of a text's first tokens it has read for this owner, at most."""
        ids = _ids(tokens)
        mine = (known for (whose, _), known in self._texts.items() if whose == owner)
        return max((_common(ids, known) for known in mine), default=0)


def _ids(tokens: Sequence[int]) -> NDArray[np.int32]:
    return np.asarray(array("i", tokens), dtype=np.int32)


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """How many tokens they begin with alike."""
    size = min(len(one), len(other))
    if not size or one[0] != other[0]:
        return 0
    differ = one[:size] != other[:size]
    first = int(differ.argmax())
    return first if differ[first] else size
