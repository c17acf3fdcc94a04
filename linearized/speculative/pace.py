"""How fast prompts are read, by the number of tokens that are read at once. Knows times; knows
neither models nor texts.
"""

from __future__ import annotations

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
        self._seen: dict[int, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=TIMES))
        """Tokens that were read at once, and how many seconds that took, by the powers of two
        below their numbers."""

    def took(self, num_tokens: int, seconds: float) -> None:
        """So many tokens were read at once in so many seconds."""
        self._seen[1 << (num_tokens.bit_length() - 1)].append((num_tokens, seconds))

    def fastest(self) -> int:
        """Tokens at once that are read in the least time each. Sizes next to it that nobody has
        seen are tried: larger ones are asked for, smaller ones are seen as prompts end."""
        size = min(START, self._most)
        while 2 * size <= self._most and self._is_known(size):
            if self._is_known(2 * size) and not self._gains(2 * size, size):
                break
            size *= 2
        known = [one for one in self._seen if one >= LEAST and self._is_known(one)]
        best = min(known, key=self._rate, default=size)
        return best if self._gains(best, size) else size

    def within(self, seconds: float) -> int:
        """The most tokens that are read at once in so many seconds; 0: not even the fewest that
        are known. More tokens at once take no more time each, as long as nobody has seen them."""
        if not self._seen:
            return min(START, self._most)
        points = sorted(self._usual(size) for size in self._seen)
        fit = max((point for point in points if point[1] <= seconds), default=None)
        if fit is None:
            return 0
        count = seconds * fit[0] / max(fit[1], 1e-9)
        longer = next((point for point in points if point[0] > fit[0]), None)
        if longer is not None:  # on the line between them; at most what took too long once more
            share = (seconds - fit[1]) / (longer[1] - fit[1])
            count = min(max(count, fit[0] + share * (longer[0] - fit[0])), longer[0])
        return min(int(count), self._most)

    def fewest(self) -> int:
        """To be read at once where even the fewest that are known take too long."""
        return max(min(self._seen, default=START) // 2, LEAST)

    def _gains(self, size: int, other: int) -> bool:
        """Is one known to be faster by so much that it is worth it?"""
        if not self._is_known(size) or not self._is_known(other):
            return False
        return GAIN * self._rate(size) < self._rate(other)

    def _is_known(self, size: int) -> bool:
        """Well: first calls set something up."""
        return len(self._seen.get(size, ())) >= 3

    def _rate(self, size: int) -> float:
        """Seconds a token."""
        num_tokens, seconds = self._usual(size)
        return seconds / num_tokens

    def _usual(self, size: int) -> tuple[int, float]:
        """Of those that were seen the one in the middle."""
        seen = sorted(self._seen[size], key=lambda one: one[1] / one[0])
        return seen[(len(seen) - 1) // 2]
