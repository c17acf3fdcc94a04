"""What an engine does, in numbers: how full it is, how long texts wait for it, what its time goes
to, and what guesses and snapshots spare.
"""

from __future__ import annotations

import time

from linearized.speculative import Engine, Piece, Prefixes, Text
from linearized.state import DecodeState
from serve_apps import metrics
from serve_apps.metrics import Growth, Meter


class Watch:
    """`step` and `add` are called in the engine's thread, the others on the event loop."""

    def __init__(self, engine: Engine, prefixes: Prefixes | None, meter: Meter) -> None:
        self._engine = engine
        self._prefixes = prefixes
        self._meter = meter
        self._arrived: dict[Text, float] = {}
        """When those came that have not been read."""
        self._spent = Growth()

    def add(self, text: Text, state: DecodeState | None, since: float) -> None:
        """To the engine, of a text that waits since then (`time.monotonic`)."""
        self._engine.add(text, state)
        self._arrived[text] = since

    def step(self) -> list[tuple[Text, Piece]]:
        began = time.monotonic()
        found = self._engine.step()
        waiting = set(self._engine.waiting)
        for text in [one for one in self._arrived if one not in waiting]:
            since = self._arrived.pop(text)
            if text in self._engine.pool or text.finished is not None:
                self._meter.observe(metrics.QUEUED, max(0.0, began - since))
        for phase, seconds in self._spent.of(self._engine.seconds).items():
            self._meter.add(metrics.ENGINE, seconds, phase=phase)
        return found

    def end(self, text: Text) -> None:
        """It has left the engine for good, at its end or before."""
        self._meter.add(metrics.ROUNDS, text.rounds)
        counted = ((metrics.DRAFTED, text.drafted), (metrics.ACCEPTED, text.accepted))
        for metric, counts in counted:
            for position, count in counts.items():
                self._meter.add(metric, count, position=str(position))
        if self._prefixes is not None:
            self._meter.add(metrics.QUERIES, text.num_prompt)
            self._meter.add(metrics.HITS, text.cached_tokens)

    def tell(self) -> None:
        """How full it is now. Prometheus forgets what is not told again."""
        running = len(self._engine.pool)
        self._meter.set(metrics.RUNNING, running)
        self._meter.set(metrics.WAITING, len(self._engine.waiting))
        held = self._engine.pool.first(running).nbytes if running else 0
        self._meter.set(metrics.STATE_BYTES, held)
        if self._prefixes is not None:
            self._meter.set(metrics.SNAPSHOTS, len(self._prefixes))
            self._meter.set(metrics.SNAPSHOT_BYTES, self._prefixes.nbytes)
