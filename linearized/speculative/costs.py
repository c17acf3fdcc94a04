"""What rounds take: measured before there are any, and as they turn out. Knows times; knows neither
models nor guesses.
"""

from __future__ import annotations

import bisect
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Now = Callable[[], float]
"""Reads a clock, in seconds."""
TIMES = 5
"""Whose median a time is taken to be."""
OUTLIER = 4.0
"""Times the shortest of them, beyond which one does not count."""


def clock_of(device: torch.device) -> Now:
    """A clock that waits until the device has done all that it was told to do; otherwise it would
    tell how long the telling took."""
    if device.type == "cpu":
        return time.perf_counter

    def now() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return now


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a forward by rows and nodes, between which it is interpolated."""

    batches: tuple[int, ...]
    nodes: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    """[batch][nodes]."""

    @classmethod
    def measure(
        cls,
        run: Callable[[int, int], object],
        *,
        max_batch: int,
        max_nodes: int,
        repeats: int = 5,
        now: Now = time.perf_counter,
    ) -> Costs:
        """`run(batch, nodes)` is one forward. Medians; the first calls of a size are not counted.
        More nodes never take less time in the table, as they never do but for chance."""
        batches, nodes = _steps(max_batch), _steps(max_nodes)
        table = []
        for batch in batches:
            row: list[float] = []
            for count in nodes:
                run(batch, count)
                times = []
                for _ in range(repeats):
                    began = now()
                    run(batch, count)
                    times.append(now() - began)
                row.append(max(statistics.median(times), *row[-1:], 0.0))
            table.append(tuple(row))
        return cls(tuple(batches), tuple(nodes), tuple(table))

    def verify(self, batch: int, nodes: int) -> float:
        below, above, share = _between(self.batches, batch)
        one, other = (self._row(self.seconds[i], nodes) for i in (below, above))
        return one + share * (other - one)

    def _row(self, row: Sequence[float], nodes: int) -> float:
        below, above, share = _between(self.nodes, nodes)
        return row[below] + share * (row[above] - row[below])


def _steps(most: int) -> list[int]:
    """1, 2, 4, 8, … and the last."""
    steps = [1]
    while steps[-1] < most:
        steps.append(min(2 * steps[-1], most))
    return steps


def _between(points: Sequence[int], value: int) -> tuple[int, int, float]:
    """Indices around a value, and where it lies between them; beyond the last, further along."""
    if len(points) == 1:
        return 0, 0, 0.0
    above = min(max(bisect.bisect_left(points, value), 1), len(points) - 1)
    below = above - 1
    share = (value - points[below]) / (points[above] - points[below])
    return below, above, max(share, 0.0)


class Recent:
    """Times of the last calls. The first one does not count, nor do those that took many times as
    long as the fastest: they set something up, or were interrupted."""

    def __init__(self, *, last: int = TIMES) -> None:
        self._called = False
        self._seconds: deque[float] = deque(maxlen=last)

    def __bool__(self) -> bool:
        return len(self._seconds) > 1

    def add(self, seconds: float) -> None:
        if self._called:
            self._seconds.append(seconds)
        self._called = True

    @property
    def usual(self) -> float:
        """Their median."""
        longest = OUTLIER * min(self._seconds)
        return statistics.median(seconds for seconds in self._seconds if seconds <= longest)


class Varying(Recent):
    """Times of calls that often take no time, and sometimes much: what counts is all that they
    take together."""

    def __init__(self) -> None:
        super().__init__(last=4 * TIMES)

    @property
    def usual(self) -> float:
        """Their mean."""
        return statistics.fmean(self._seconds)


class Clock:
    """What rounds take, but for drafting: the forward, as measured beforehand, and all around it,
    as it turns out. Drafts cost more than their own time: they drive the target's weights and
    states out of the processor's caches, also for the round after them."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._around: dict[tuple[int, bool], Recent] = defaultdict(Recent)
        """Times the seconds of the table, by texts, and with drafting or without."""
        self._drafted = False

    def took(self, batch: int, nodes: int, seconds: float, *, drafted: bool) -> None:
        """A round of so many texts, with trees of at most so many nodes."""
        if drafted or not self._drafted:
            self._around[batch, drafted].add(seconds / self._costs.verify(batch, 1 + nodes))
        self._drafted = drafted

    def knows(self, batch: int) -> bool:
        """Have there been rounds without drafts?"""
        return bool(self._around[batch, False])

    def seconds(self, batch: int, nodes: int, *, drafted: bool) -> float:
        """What such a round takes; without drafts no longer than with some, all else being
        equal."""
        with_, without = self._around[batch, True], self._around[batch, False]
        known = [around.usual for around in (with_, without) if around] or [1.0]
        around = known[0] if drafted else min(known)
        return self._costs.verify(batch, 1 + nodes) * around
