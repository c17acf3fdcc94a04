"""The target's end of the links to draft replicas: which text's session is with whom.

Knows sessions and replicas; knows no model. Nothing here waits for a draft, and nothing here
changes a text.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import threading
from collections.abc import Awaitable, Callable, Sequence

from linearized.speculative import Text
from serve_apps.link.connection import HEARTBEAT_S, LinkError
from serve_apps.link.discovery import Find, Peers
from serve_apps.link.draft_peer import DraftPeer
from serve_apps.link.draft_session import DraftSession
from serve_apps.link.placement import place
from serve_apps.link.protocol import Endpoint
from serve_apps.metrics import Meter

Wake = Callable[[], Awaitable[object]]
"""Has a replica started where there is none, and waits until it runs."""

log = logging.getLogger(__name__)


class DraftLinks:
    """Start it, take a `session` for each text, and close it, all on one event loop."""

    def __init__(
        self,
        find: Find,
        wake: Wake | None = None,
        *,
        vocab_size: int,
        tokenizer: str = "",
        heartbeat_s: float = HEARTBEAT_S,
        meter: Meter | None = None,
    ) -> None:
        """`wake` is called while something is ordered and there is no replica. `vocab_size`,
        `tokenizer`: the target's, as its drafts have them in their Endpoints."""
        self.arrived = threading.Condition()
        """Told whenever a draft has said something, or will not."""
        self._find = find
        self._wake = wake
        self._waking: asyncio.Task[None] | None = None
        self._vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._heartbeat_s = heartbeat_s
        self._meter = meter or Meter()
        self._name = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._wanted: set[int] = set()
        """Numbers of the sessions for which something was ordered in vain."""
        self._peers = Peers(self._look, self._link, kind="draft")
        self._up = asyncio.Event()

    def start(self) -> None:
        self._peers.start()

    async def close(self) -> None:
        await self._peers.close()
        self._rest()

    @property
    def connected(self) -> bool:
        return self._peers.connected

    @property
    def num_sessions(self) -> int:
        return sum(len(peer.sessions) for peer in self._peers)

    async def wait_connected(self, seconds: float) -> bool:
        """Wait for a link, at most this many seconds, and say whether there is one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._up.wait()
        return self.connected

    @property
    def usable(self) -> bool:
        """Is there one to be asked? Any thread may want to know."""
        return any(peer.usable for peer in self._peers)

    def session(self, text: Text) -> DraftSession:
        """For this text. Nothing is sent before `order`."""
        return DraftSession(self, next(self._numbers), text)

    def closed(self, session: DraftSession) -> None:
        """Nothing more will be asked for it."""
        self._wanted.discard(session.number)

    def choose(self, session: DraftSession) -> DraftPeer | None:
        """A replica for a session that has none, if there is one to be asked."""
        peers = {repr(peer.endpoint): peer for peer in self._peers if peer.usable}
        loads = {name: len(peer.sessions) for name, peer in peers.items()}
        name = place(f"{self._name}/{session.number}", loads)
        if name is None:
            self._wanted.add(session.number)
            return None
        self._wanted.discard(session.number)
        return peers[name]

    async def _look(self) -> Sequence[Endpoint]:
        found = await self._find()
        if found or not self._wanted:
            self._rest()
        elif self._wake is not None and (self._waking is None or self._waking.done()):
            self._waking = asyncio.create_task(self._have_one_started(self._wake))
        return found

    async def _have_one_started(self, wake: Wake) -> None:
        try:
            await wake()
        except Exception as error:  # whatever Serve raises: the next look tries again
            log.warning("no draft replica could be started: %s", error)

    def _rest(self) -> None:
        waking, self._waking = self._waking, None
        if waking is not None:
            waking.cancel()

    def _link(self, endpoint: Endpoint) -> DraftPeer:
        if problem := self._problem(endpoint):
            raise LinkError(problem)
        return DraftPeer(
            endpoint,
            heartbeat_s=self._heartbeat_s,
            heard=self._heard,
            turned=self._turned,
            meter=self._meter,
        )

    def _problem(self, endpoint: Endpoint) -> str:
        """Why this draft is of no use. One with the same tokenizer may have rows for more or fewer
        tokens, as vocabularies are padded."""
        if self._tokenizer and endpoint.tokenizer:
            if self._tokenizer == endpoint.tokenizer:
                return ""
            return f"{endpoint!r} has another tokenizer than the target, so it is not used"
        if self._vocab_size == endpoint.vocab_size:
            return ""
        return (
            f"the draft's vocabulary has {endpoint.vocab_size} tokens, the target's "
            f"{self._vocab_size}; they must share one tokenizer, so it is not used"
        )

    def _heard(self) -> None:
        with self.arrived:
            self.arrived.notify_all()

    def _turned(self) -> None:
        if self.connected:
            self._up.set()
        else:
            self._up.clear()
        self._peers.turned()
        self._heard()
