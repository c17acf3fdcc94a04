"""The replicas of a deployment, found again and again, and one peer for each of them.

Knows endpoints, and how long to wait between two looks; knows nothing of what is said to a peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from serve_apps.link.connection import LinkError
from serve_apps.link.protocol import Endpoint

FIND_S = 10.0
"""Seconds that naming replicas may take."""
EVERY_S = (0.1, 2.0)
"""Seconds from one time to the next: at first, and once there is a connection. In between they
double."""

Find = Callable[[], Awaitable[Sequence[Endpoint]]]
"""Names all replicas that live. It starts none."""

log = logging.getLogger(__name__)


class Peer(Protocol):
    """One replica."""

    @property
    def connected(self) -> bool: ...

    @property
    def gone(self) -> bool:
        """Will there be no connection to it any more?"""
        ...

    async def close(self) -> None: ...


P = TypeVar("P", bound=Peer)


class Peers(Generic[P]):
    """Start it and close it on one event loop."""

    def __init__(self, find: Find, make: Callable[[Endpoint], P], *, kind: str) -> None:
        """`make` connects to a replica; it raises LinkError where that is of no use. `kind` says
        what is looked for, in the log."""
        self._find = find
        self._make = make
        self._kind = kind
        self._peers: dict[Endpoint, P] = {}
        self._turned = asyncio.Event()
        """A connection was made or lost, since replicas were named last."""
        self._task: asyncio.Task[None] | None = None

    def __iter__(self) -> Iterator[P]:
        """Any thread may want to know."""
        return iter(list(self._peers.values()))

    @property
    def connected(self) -> bool:
        return any(peer.connected for peer in self)

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._follow())

    def turned(self) -> None:
        """Say that a connection was made or lost: look again soon."""
        self._turned.set()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        peers, self._peers = self._peers, {}
        await asyncio.gather(*(peer.close() for peer in peers.values()))

    async def _follow(self) -> None:
        """Again at once when a connection is lost; seldom while all is well."""
        shortest, longest = EVERY_S
        pause, said = shortest, ""
        while True:
            self._turned.clear()
            try:
                async with asyncio.timeout(FIND_S):
                    found = await self._find()
                reason = await self._take(found)
            except Exception as error:  # Serve raises errors of its own while replicas change
                reason = str(error).strip().split("\n")[0] or type(error).__name__
            if reason and reason != said:  # once, not at every attempt
                log.warning("no %s replica for now: %s", self._kind, reason)
            said = reason
            await asyncio.sleep(random.uniform(pause / 2, pause))
            calm = self.connected and not await self._turns(longest)
            pause = shortest if calm else min(2 * pause, longest)

    async def _turns(self, seconds: float) -> bool:
        """Is a connection made or lost, within so long?"""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._turned.wait()
        return self._turned.is_set()

    async def _take(self, found: Sequence[Endpoint]) -> str:
        """A peer for each that is new, and none for those that are no longer. Says what is
        wrong."""
        for endpoint, peer in list(self._peers.items()):
            if peer.gone or (endpoint not in found and not peer.connected):
                del self._peers[endpoint]
                await peer.close()
        reason = "" if found else "there is none"
        for endpoint in found:
            if endpoint not in self._peers:
                try:
                    self._peers[endpoint] = self._make(endpoint)
                except LinkError as error:
                    reason = str(error)
        return reason
