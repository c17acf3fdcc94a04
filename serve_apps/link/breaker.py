"""Whether a peer is used: not for a while after it has failed a few times in a row, and then on
trial. Knows failures and time; knows no connection.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

FAILURES = 3
"""In a row, after which the peer is left alone."""
PAUSE_S = (0.5, 30.0)
"""Shortest and longest time for which it is, in seconds. Each trial that fails doubles it."""


class Breaker:
    """A circuit breaker (Nygard, "Release It!", 2007): closed while all is well, open for a pause
    after failures, then half open until the next success or failure."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._failures = 0
        self._pause = PAUSE_S[0]
        self._until = 0.0
        """When a pause ends."""

    @property
    def allows(self) -> bool:
        """May the peer be used, or tried?"""
        return self._now() >= self._until

    @property
    def left_s(self) -> float:
        """Seconds until it may be tried."""
        return max(self._until - self._now(), 0.0)

    def succeeded(self) -> None:
        self._failures, self._pause, self._until = 0, PAUSE_S[0], 0.0

    def failed(self, *, at_once: bool = False) -> None:
        """`at_once`: leave the peer alone after this one, as where it cannot be reached."""
        if not self.allows:
            return  # it has been left alone since
        self._failures = FAILURES if at_once else self._failures + 1
        if self._failures >= FAILURES:
            self._until = self._now() + self._pause * random.uniform(0.5, 1.0)
            self._pause = min(2 * self._pause, PAUSE_S[1])
