"""One draft replica, as a target sees it: a connection that is made again whenever it breaks, how
fast it answers, and whether to use it at all.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable

from serve_apps import metrics
from serve_apps.link.breaker import Breaker
from serve_apps.link.connection import Connection, LinkError, dial
from serve_apps.link.draft_session import LATE_S, DraftSession
from serve_apps.link.protocol import Draft, Endpoint, Error, GoAway, Message
from serve_apps.metrics import Meter

SEEN = 16
"""Answers whose times are remembered, …"""
ENOUGH = 4
"""… and how many it takes to know what is usual."""
LONGER = 1.5
"""Times what the longest of them took, and …"""
MARGIN_S = 0.002
"""… so much more, is how long an answer may take to be expected."""
RECONNECT_S = 0.1
"""Shortest pause before a connection that has ended is made again."""

log = logging.getLogger(__name__)


class DraftPeer:
    def __init__(
        self,
        endpoint: Endpoint,
        *,
        heartbeat_s: float,
        heard: Callable[[], None],
        turned: Callable[[], None],
        meter: Meter | None = None,
    ) -> None:
        """`heard` is called when it has said something, `turned` when a connection has been made or
        lost."""
        self.endpoint = endpoint
        self.breaker = Breaker()
        self.sessions: dict[int, DraftSession] = {}
        """Those that are open there."""
        self._heartbeat_s = heartbeat_s
        self._heard = heard
        self._turned = turned
        self._meter = meter or Meter()
        self._connection: Connection | None = None
        self._latencies: deque[float] = deque(maxlen=SEEN)
        self._task = asyncio.create_task(self._run())

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def gone(self) -> bool:
        """Has it said goodbye?"""
        return self._task.done()

    @property
    def usable(self) -> bool:
        return self._connection is not None and self.breaker.allows

    @property
    def patience_s(self) -> float:
        """Seconds within which an answer comes, if it comes."""
        if len(self._latencies) < ENOUGH:
            return float("inf")
        return LONGER * max(self._latencies) + MARGIN_S

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def send(self, message: Message) -> None:
        if self._connection is not None:
            self._connection.send(message)

    def answered(self, seconds: float | None, *, late: bool = False) -> None:
        """A tree has come after so long; None: after much had to be read. `late`: its text had gone
        on already."""
        if seconds is not None:
            self._latencies.append(seconds)
            self._meter.observe(metrics.DRAFT_LATENCY, seconds)
        if late:
            self._meter.add(metrics.DRAFT_LATE)
        if seconds is None or seconds <= LATE_S:
            self.breaker.succeeded()
        else:
            self.failed()

    def failed(self) -> None:
        """A tree should have come long ago."""
        was = self.breaker.allows
        self.breaker.failed()
        if was and not self.breaker.allows:
            log.warning("%r does not answer; texts go on without it", self.endpoint)

    async def _run(self) -> None:
        """Connect, listen until it breaks, pause, again. Ends when the replica says that it goes
        away."""
        said = ""
        while True:
            await asyncio.sleep(self.breaker.left_s)
            try:
                await self._listen()
                return
            except Exception as error:
                reason = str(error).strip().split("\n")[0] or type(error).__name__
            self.breaker.failed(at_once=True)
            if reason != said:  # once, not at every attempt
                log.warning("no link to a draft replica for now: %s", reason)
            said = reason
            await asyncio.sleep(RECONNECT_S * random.uniform(0.5, 1.0))

    async def _listen(self) -> None:
        """Until the draft says that it goes away; raises if it does so without a word."""
        connection = await dial(self.endpoint, heartbeat_s=self._heartbeat_s)
        self._connection = connection
        self._turned()
        try:
            while True:
                message = await connection.receive()
                if isinstance(message, GoAway):
                    return
                self._deliver(message)
                self._heard()
        finally:
            self._connection = None
            for session in list(self.sessions.values()):
                session.lose()
            self._turned()
            await connection.abort()

    def _deliver(self, message: Message) -> None:
        if not isinstance(message, Draft | Error):
            raise LinkError(f"a draft replica does not send {type(message).__name__}")
        session = self.sessions.get(message.session)
        if session is None:
            return  # closed or moved in the meantime
        if isinstance(message, Draft):
            session.receive(message)
        else:
            session.fail(message)
