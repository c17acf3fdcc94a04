"""The target's end of the link: one connection to a draft replica, made again whenever it breaks.

Knows sessions, drafts and deadlines; knows no model. Nothing here waits for a draft longer than it
is told to, and nothing here changes a text.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence

from linearized.speculative import Sampling, TokenTree
from serve_apps.link import protocol
from serve_apps.link.connection import HEARTBEAT_S, Connection, LinkError, dial
from serve_apps.link.protocol import Close, Commit, Draft, Endpoint, Error, GoAway, Open

FIND_S = 10.0
"""Seconds that Serve may take to name a draft replica before it is asked again."""
BACKOFF_S = (0.1, 5.0)
"""Shortest and longest pause before the next attempt, in seconds."""
MAX_REOPENED = 8
"""How often a session is opened again before the draft is left alone with it."""

log = logging.getLogger(__name__)


class DraftLink:
    """The link to a draft replica. Start it, take a `session` for each text, and close it, all on
    one event loop."""

    def __init__(
        self,
        find: Callable[[], Awaitable[Endpoint]],
        *,
        vocab_size: int,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        """`find` names a draft replica that lives; it is asked again for each new connection."""
        self._find = find
        self._vocab_size = vocab_size
        self._heartbeat_s = heartbeat_s
        self._sessions: dict[int, LinkSession] = {}
        self._numbers = itertools.count()
        self._task: asyncio.Task[None] | None = None
        self._up = asyncio.Event()
        self.connection: Connection | None = None

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    @property
    def connected(self) -> bool:
        return self.connection is not None

    async def wait_connected(self, seconds: float) -> bool:
        """Wait for a link, at most this many seconds, and say whether there is one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._up.wait()
        return self.connected

    def session(self, sampling: Sampling, num_prompt: int) -> LinkSession:
        """A new session for a text whose prompt has this many tokens."""
        number = next(self._numbers)
        session = LinkSession(self, number, sampling, num_prompt, self._vocab_size)
        self._sessions[number] = session
        return self._sessions[number]

    def forget(self, number: int) -> None:
        self._sessions.pop(number, None)

    async def _run(self) -> None:
        """Connect, read until it breaks, pause, again."""
        shortest, longest = BACKOFF_S
        pause = shortest
        said = ""
        while True:
            began = time.monotonic()
            try:
                await self._serve_once()
                reason = "it is about to end"
            except Exception as error:  # Serve raises errors of its own while replicas change
                reason = str(error).strip().split("\n")[0] or type(error).__name__
            if reason != said:  # once, not at every attempt
                log.warning("no draft replica for now: %s", reason)
            said = reason
            if time.monotonic() - began > longest:
                pause = shortest
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, longest)

    async def _serve_once(self) -> None:
        """Until the draft says that it goes away; raises if it does so without a word."""
        async with asyncio.timeout(FIND_S):
            endpoint = await self._find()
        if endpoint.vocab_size != self._vocab_size:
            raise LinkError(
                f"the draft's vocabulary has {endpoint.vocab_size} tokens, the target's "
                f"{self._vocab_size}; they must share one tokenizer, so it is not used"
            )
        connection = await dial(endpoint, heartbeat_s=self._heartbeat_s)
        self.connection = connection
        self._up.set()
        try:
            while True:
                message = await connection.receive()
                if isinstance(message, GoAway):
                    return
                self._deliver(message)
        finally:
            self.connection = None
            self._up.clear()
            for session in self._sessions.values():
                session.lose()
            await connection.abort()

    def _deliver(self, message: protocol.Message) -> None:
        if not isinstance(message, Draft | Error):
            raise LinkError(f"a draft replica does not send {type(message).__name__}")
        session = self._sessions.get(message.session)
        if session is None:
            return  # closed in the meantime
        if isinstance(message, Draft):
            session.receive(message)
        else:
            session.fail(message)


class LinkSession:
    """One text's side of the link. Tell it how the text goes on; ask it for a tree."""

    def __init__(
        self, link: DraftLink, number: int, sampling: Sampling, num_prompt: int, vocab_size: int
    ) -> None:
        self._link = link
        self._number = number
        self._sampling = sampling
        self._num_prompt = num_prompt
        self._vocab_size = vocab_size
        self._connection: Connection | None = None
        """Where the session is open."""
        self._epoch = 0
        self._tokens: list[int] = []
        self._tree: TokenTree | None = None
        self._changed = asyncio.Event()
        """A tree has come, or none will."""
        self._refused = False

    def advance(self, tokens: Sequence[int]) -> None:
        """The text now reads `tokens`: an extension of what it read before. Asks for a tree."""
        known = len(self._tokens)
        new = tuple(tokens[known:])
        self._tokens += new
        self._tree = None
        self._changed.clear()
        connection = self._link.connection
        if connection is None or self._refused:
            return
        if self._connection is not connection:
            self._open(connection)
        else:
            connection.send(Commit(self._number, self._epoch, known, new))

    async def tree(self, seconds: float) -> TokenTree | None:
        """What the draft makes of the text as last advanced, or None if that is not here within
        this long; at once if there is nobody to wait for."""
        if self._tree is None and seconds > 0 and self._waiting():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
        return self._tree

    def close(self) -> None:
        self._link.forget(self._number)
        if self._connection is not None and self._waiting():
            self._connection.send(Close(self._number))
        self._connection = None

    def receive(self, draft: Draft) -> None:
        if draft.epoch == self._epoch and draft.base == len(self._tokens):
            self._tree = draft.tree
            self._changed.set()

    def fail(self, error: Error) -> None:
        if error.epoch != self._epoch:
            return
        connection = self._link.connection
        reopen = error.code == protocol.UNKNOWN_SESSION and self._epoch < MAX_REOPENED
        if reopen and connection is not None:
            self._open(connection)
            return
        log.info("the draft replica gives up on a text: %s", error.message)
        self._refused = True
        self.lose()

    def lose(self) -> None:
        """Nobody will answer; whoever waits may go on."""
        self._connection = None
        self._changed.set()

    def _waiting(self) -> bool:
        return self._connection is not None and self._connection is self._link.connection

    def _open(self, connection: Connection) -> None:
        self._connection = connection
        self._epoch += 1
        message = Open(
            self._number,
            self._epoch,
            tuple(self._tokens),
            self._num_prompt,
            self._sampling,
            self._vocab_size,
        )
        try:
            connection.send(message)
        except protocol.ProtocolError:  # too long for a frame
            self._refused = True
            self.lose()
