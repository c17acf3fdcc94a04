"""How fast prompts are read, by the number of tokens that are read at once. Knows times; knows
neither models nor texts.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

START = 512
"""Tokens at once as long as nothing is known."""
LEAST, MOST = 16, 4096
"""Fewer and more are never asked for."""
GAIN = 1.05
"""Times the speed that another size must have to be worth it."""
TIMES = 5
"""Whose median a speed is taken to be."""


class Pace:
    def __init__(self, *, most: int = MOST) -> None:
        """`most`: tokens that may be read at once."""
        self._most = most
        self._seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=TIMES))
        """Of a token, by powers of two of the tokens that were read with it."""

    def took(self, num_tokens: int, seconds: float) -> None:
        """So many tokens were read at once in so many seconds."""
        self._seconds[1 << (num_tokens.bit_length() - 1)].append(seconds / num_tokens)

    def fastest(self) -> int:
        """Tokens at once that are read in the least time each. Sizes next to it that nobody has
        seen are tried: larger ones are asked for, smaller ones are seen as prompts end."""
        size = min(START, self._most)
        while 2 * size <= self._most and self._is_known(size):
            if self._is_known(2 * size) and not self._gains(2 * size, size):
                break
            size *= 2
        known = [one for one in self._seconds if one >= LEAST and self._is_known(one)]
        best = min(known, key=self._median, default=size)
        return best if self._gains(best, size) else size

    def within(self, seconds: float) -> int:
        """The most tokens that are read at once in so many seconds; 0: not even the fewest that
        are known. More tokens at once take no more time each, as long as nobody has seen them."""
        if not self._seconds:
            return min(START, self._most)
        fits, bound = 0, self._most
        for size in self._seconds:
            count = int(seconds / self._median(size))
            if count >= size:
                fits = max(fits, count)
            else:
                bound = min(bound, size)
        return min(fits, bound)

    def fewest(self) -> int:
        """To be read at once where even the fewest that are known take too long."""
        return max(min(self._seconds, default=START) // 2, LEAST)

    def _gains(self, size: int, other: int) -> bool:
        """Is one known to be faster by so much that it is worth it?"""
        if not self._is_known(size) or not self._is_known(other):
            return False
        return GAIN * self._median(size) < self._median(other)

    def _is_known(self, size: int) -> bool:
        """Well: first calls set something up."""
        return len(self._seconds.get(size, ())) >= 3

    def _median(self, size: int) -> float:
        return statistics.median_low(self._seconds[size])
