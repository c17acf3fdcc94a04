"""The draft's end of the link: sessions of all targets, drafted for side by side.

Knows sockets and sessions; of drafters only `propose` and `forget`, which run in the one thread
that the caller gives. What it remembers can always be rebuilt from token ids.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable

from linearized.errors import ConfigError
from linearized.speculative import Ask, Drafter, Text, TokenTree
from serve_apps.forward import Forward
from serve_apps.link import protocol
from serve_apps.link.connection import HEARTBEAT_S, Connection, LinkError
from serve_apps.link.listener import ANY_PORT, Listener
from serve_apps.link.protocol import (
    Close,
    Commit,
    Draft,
    Endpoint,
    Error,
    GoAway,
    Open,
)

log = logging.getLogger(__name__)

Key = tuple[Connection, int]


class DraftServer:
    def __init__(
        self,
        make: Callable[[], Drafter],
        *,
        forward: Forward,
        fingerprint: str,
        vocab_size: int,
        max_nodes: int = 16,
        max_sessions: int = 64,
        host: str = "127.0.0.1",
        ports: tuple[int, int] = ANY_PORT,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        """`make` makes the drafter, in the forward thread; its trees have up to `max_nodes`. Beyond
        `max_sessions` the longest unused one is forgotten; its target opens it anew if it goes
        on."""
        self._make = make
        self._drafter: Drafter | None = None
        self._max_nodes = max_nodes
        self._forward = forward
        self._fingerprint = fingerprint
        self._vocab_size = vocab_size
        self._max_sessions = max_sessions
        self._listener = Listener(self._listen, host=host, ports=ports, heartbeat_s=heartbeat_s)
        self._sessions: OrderedDict[Key, _Session] = OrderedDict()
        self._due: OrderedDict[Key, None] = OrderedDict()
        """Sessions whose text has gone on since they were last drafted for, in that order."""
        self._ended: list[Text] = []
        """Texts that the drafter is to forget."""
        self._wake = asyncio.Event()
        self._drafting: asyncio.Task[None] | None = None

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    async def start(self) -> Endpoint:
        """Listen.

        Raises:
            ConfigError: none of the ports is free.
        """
        endpoint = await self._listener.start(
            fingerprint=self._fingerprint, vocab_size=self._vocab_size
        )
        self._drafting = asyncio.create_task(self._draft())
        return endpoint

    @property
    def running(self) -> bool:
        return self._drafting is not None and not self._drafting.done()

    async def close(self) -> None:
        """Tell all targets to look for another draft, then stop."""
        if self._drafting is None:
            return
        self._drafting.cancel()
        await asyncio.gather(self._drafting, return_exceptions=True)
        for connection in self._listener.connections:
            connection.send(GoAway())
        await self._listener.close()

    async def _listen(self, connection: Connection) -> None:
        try:
            while True:
                self._take(connection, await connection.receive())
        finally:
            for key in [key for key in self._sessions if key[0] is connection]:
                self._forget(key)

    def _take(self, connection: Connection, message: protocol.Message) -> None:
        match message:
            case Open():
                self._open(connection, message)
            case Commit():
                self._commit(connection, message)
            case Close():
                self._forget((connection, message.session))
            case _:
                raise LinkError(f"a target does not send {type(message).__name__}")

    def _open(self, connection: Connection, message: Open) -> None:
        key = (connection, message.session)
        former = self._sessions.get(key)
        if former is not None and message.epoch <= former.epoch:
            return
        problem = self._problem(message)
        if problem is not None:
            connection.send(Error(message.session, message.epoch, protocol.REFUSED, problem))
            return
        self._forget(key)
        self._sessions[key] = _Session(message)
        self._request(key)
        while len(self._sessions) > self._max_sessions:
            self._forget(next(iter(self._sessions)))

    def _problem(self, message: Open) -> str | None:
        if message.vocab_size != self._vocab_size:
            return f"the target's vocabulary is {message.vocab_size}, mine {self._vocab_size}"
        if not message.tokens:
            return "there are no tokens to go on from"
        if max(message.tokens) >= self._vocab_size:
            return "a token is outside the vocabulary"
        try:
            message.sampling.check(self._vocab_size)
        except ConfigError as error:
            return str(error)
        return None

    def _commit(self, connection: Connection, message: Commit) -> None:
        key = (connection, message.session)
        session = self._sessions.get(key)
        if session is not None and message.epoch < session.epoch:
            return
        length = session.length if session is not None else 0
        if session is None or message.epoch > session.epoch or message.base > length:
            unknown = "open it anew with all its tokens"
            code = protocol.UNKNOWN_SESSION
            connection.send(Error(message.session, message.epoch, code, unknown))
            return
        new = message.tokens[length - message.base :]
        if not new:
            return  # said before
        if max(new) >= self._vocab_size:
            raise LinkError("a token is outside the vocabulary")
        session.ahead += new
        self._request(key)

    def _request(self, key: Key) -> None:
        self._sessions.move_to_end(key)
        self._due[key] = None
        self._wake.set()

    def _forget(self, key: Key) -> None:
        session = self._sessions.pop(key, None)
        self._due.pop(key, None)
        if session is not None:
            self._ended.append(session.text)
            self._wake.set()

    async def _draft(self) -> None:
        """All that are due at once. A session that goes on meanwhile is drafted for once, from
        where it is then."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._due or self._ended:
                due = [(key, self._sessions[key]) for key in self._due]
                self._due.clear()
                ended, self._ended = self._ended, []
                await self._draft_for(due, ended)

    async def _draft_for(self, due: list[tuple[Key, _Session]], ended: list[Text]) -> None:
        for _, session in due:
            session.go_on()
        trees = await self._forward.run(self._propose, [session.text for _, session in due], ended)
        for (key, session), tree in zip(due, trees, strict=True):
            connection, number = key
            current = self._sessions.get(key) is session
            if tree is None:
                if current:
                    self._forget(key)
                failed = Error(number, session.epoch, protocol.REFUSED, "drafting failed")
                connection.send(failed)
            elif current and not session.ahead:
                connection.send(Draft(number, session.epoch, len(session.text.tokens), tree))

    def _propose(self, texts: list[Text], ended: list[Text]) -> list[TokenTree | None]:
        """In the forward thread. None: no tree can be drafted for this text."""
        if self._drafter is None:
            self._drafter = self._make()
        for text in ended:
            self._drafter.forget(text)
        depth = self._drafter.depth
        asks = [Ask(text, depth, self._max_nodes) for text in texts]
        try:
            return list(self._drafter.propose(asks)) if asks else []
        except Exception:
            if len(asks) > 1:  # let the others have theirs
                return [tree for text in texts for tree in self._propose([text], [])]
            log.exception("drafting failed; the session goes on without")
            return [None]


class _Session:
    def __init__(self, message: Open) -> None:
        self.epoch = message.epoch
        self.text = Text(
            message.tokens,
            sampling=message.sampling,
            max_new_tokens=0,
            num_prompt=message.num_prompt,
        )
        """As far as it is drafted for; the forward thread reads it."""
        self.ahead: list[int] = []
        """Tokens that have come since."""

    @property
    def length(self) -> int:
        return len(self.text.tokens) + len(self.ahead)

    def go_on(self) -> None:
        self.text.tokens += self.ahead
        self.ahead = []
