"""The target's end of the links to draft replicas: who they are, and which text's session is with
whom.

Knows sessions and replicas; knows no model. Nothing here waits for a draft, and nothing here
changes a text.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import secrets
import threading
from collections.abc import Awaitable, Callable, Sequence

from linearized.speculative import Text
from serve_apps.link.connection import HEARTBEAT_S
from serve_apps.link.draft_peer import DraftPeer
from serve_apps.link.draft_session import DraftSession
from serve_apps.link.placement import place
from serve_apps.link.protocol import Endpoint
from serve_apps.metrics import Meter

FIND_S = 10.0
"""Seconds that naming the draft replicas may take."""
EVERY_S = (0.1, 5.0)
"""Seconds from one time to the next: at first, and once there is a link. In between they double."""

FindDrafts = Callable[[], Awaitable[Sequence[Endpoint]]]
"""Names draft replicas that live: all of them, or some, at each call maybe others."""

log = logging.getLogger(__name__)


class DraftLinks:
    """Start it, take a `session` for each text, and close it, all on one event loop."""

    def __init__(
        self,
        find: FindDrafts,
        *,
        vocab_size: int,
        heartbeat_s: float = HEARTBEAT_S,
        meter: Meter | None = None,
    ) -> None:
        self.arrived = threading.Condition()
        """Told whenever a draft has said something, or will not."""
        self._find = find
        self._vocab_size = vocab_size
        self._heartbeat_s = heartbeat_s
        self._meter = meter or Meter()
        self._name = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._peers: dict[Endpoint, DraftPeer] = {}
        self._up = asyncio.Event()
        self._lost = asyncio.Event()
        """A link was, since replicas were named last; or was made."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._discover())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        peers, self._peers = self._peers, {}
        await asyncio.gather(*(peer.close() for peer in peers.values()))

    @property
    def connected(self) -> bool:
        return any(peer.connected for peer in self._peers.values())

    @property
    def num_sessions(self) -> int:
        return sum(len(peer.sessions) for peer in self._peers.values())

    async def wait_connected(self, seconds: float) -> bool:
        """Wait for a link, at most this many seconds, and say whether there is one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._up.wait()
        return self.connected

    @property
    def usable(self) -> bool:
        """Is there one to be asked? Any thread may want to know."""
        return any(peer.usable for peer in list(self._peers.values()))

    def session(self, text: Text) -> DraftSession:
        """For this text. Nothing is sent before `order`."""
        return DraftSession(self, next(self._numbers), text, self._vocab_size)

    def choose(self, session: DraftSession) -> DraftPeer | None:
        """A replica for a session that has none, if there is one to be asked."""
        peers = {repr(peer.endpoint): peer for peer in self._peers.values() if peer.usable}
        loads = {name: len(peer.sessions) for name, peer in peers.items()}
        name = place(f"{self._name}/{session.number}", loads)
        return None if name is None else peers[name]

    async def _discover(self) -> None:
        """Again at once when a link is lost; seldom while all is well."""
        shortest, longest = EVERY_S
        pause, said = shortest, ""
        while True:
            self._lost.clear()
            try:
                async with asyncio.timeout(FIND_S):
                    found = await self._find()
                reason = await self._take(found)
            except Exception as error:  # Serve raises errors of its own while replicas change
                reason = str(error).strip().split("\n")[0] or type(error).__name__
            if reason and reason != said:  # once, not at every attempt
                log.warning("no draft replica for now: %s", reason)
            said = reason
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, longest)
            if self.connected:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(longest):
                        await self._lost.wait()
                pause = shortest

    async def _take(self, found: Sequence[Endpoint]) -> str:
        """Link to those that are new, and let go of those that are no longer. Says what is
        wrong."""
        for endpoint, peer in list(self._peers.items()):
            if peer.gone or (endpoint not in found and not peer.connected):
                del self._peers[endpoint]
                await peer.close()
        reason = "" if found else "there is none"
        for endpoint in found:
            if endpoint.vocab_size != self._vocab_size:
                reason = (
                    f"the draft's vocabulary has {endpoint.vocab_size} tokens, the target's "
                    f"{self._vocab_size}; they must share one tokenizer, so it is not used"
                )
            elif endpoint not in self._peers:
                self._peers[endpoint] = DraftPeer(
                    endpoint,
                    heartbeat_s=self._heartbeat_s,
                    heard=self._heard,
                    turned=self._turned,
                    meter=self._meter,
                )
        return reason

    def _heard(self) -> None:
        with self.arrived:
            self.arrived.notify_all()

    def _turned(self) -> None:
        if self.connected:
            self._up.set()
        else:
            self._up.clear()
        self._lost.set()
        self._heard()
