"""The draft's end of the link: sessions of all targets, drafted for one after another.

Knows sockets, sessions and their order; of drafters only `propose`, which runs in the one thread
that the caller gives. What it remembers can always be rebuilt from token ids.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable

from linearized.speculative import Drafter, Sampling, TokenTree
from serve_apps import protocol
from serve_apps.connection import HEARTBEAT_S, Connection, LinkError, accept
from serve_apps.forward import Forward
from serve_apps.protocol import Close, Commit, Draft, Endpoint, Error, GoAway, Open, ProtocolError

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
        max_sessions: int = 64,
        host: str = "127.0.0.1",
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        """`make` gives a session its drafter, in the forward thread. Beyond `max_sessions` the
        longest unused one is forgotten; its target opens it anew if it goes on."""
        self._make = make
        self._forward = forward
        self._fingerprint = fingerprint
        self._vocab_size = vocab_size
        self._max_sessions = max_sessions
        self._host = host
        self._heartbeat_s = heartbeat_s
        self._secret = secrets.token_bytes(32)
        self._sessions: OrderedDict[Key, _Session] = OrderedDict()
        self._due: OrderedDict[Key, None] = OrderedDict()
        """Sessions whose text has gone on since they were last drafted for, in that order."""
        self._wake = asyncio.Event()
        self._peers: dict[asyncio.Task[None], Connection | None] = {}
        self._server: asyncio.Server | None = None
        self._drafting: asyncio.Task[None] | None = None

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    async def start(self) -> Endpoint:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._accept, self._host, 0)
        self._drafting = asyncio.create_task(self._draft())
        port = self._server.sockets[0].getsockname()[1]
        return Endpoint(
            host=self._host,
            port=port,
            secret=self._secret,
            fingerprint=self._fingerprint,
            vocab_size=self._vocab_size,
        )

    @property
    def running(self) -> bool:
        return self._drafting is not None and not self._drafting.done()

    async def close(self) -> None:
        """Tell all targets to look elsewhere, then end."""
        if self._server is None or self._drafting is None:
            return
        self._server.close()
        self._drafting.cancel()
        for connection in list(self._peers.values()):
            if connection is not None:
                connection.send(GoAway())
                await connection.close()
        tasks = [self._drafting, *self._peers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._peers[task] = None
        try:
            connection = await accept(reader, writer, self._secret, heartbeat_s=self._heartbeat_s)
            self._peers[task] = connection
            await self._listen(connection)
        except (LinkError, ProtocolError) as error:
            log.info("draft link: %s", error)
        except asyncio.CancelledError:
            pass  # a task of asyncio's own: raising would only be logged
        finally:
            del self._peers[task]

    async def _listen(self, connection: Connection) -> None:
        try:
            while True:
                self._take(connection, await connection.receive())
        finally:
            for key in [key for key in self._sessions if key[0] is connection]:
                self._forget(key)
            await connection.abort()

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
        self._sessions[key] = _Session(message.epoch, list(message.tokens), message.sampling)
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
        return None

    def _commit(self, connection: Connection, message: Commit) -> None:
        key = (connection, message.session)
        session = self._sessions.get(key)
        if session is not None and message.epoch < session.epoch:
            return
        length = len(session.tokens) if session is not None else 0
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
        session.tokens += new
        self._request(key)

    def _request(self, key: Key) -> None:
        self._sessions.move_to_end(key)
        self._due[key] = None
        self._wake.set()

    def _forget(self, key: Key) -> None:
        self._sessions.pop(key, None)
        self._due.pop(key, None)

    async def _draft(self) -> None:
        """One tree at a time, for the session that has waited longest. A session that goes on
        meanwhile is drafted for once, from where it is then."""
        while True:
            await self._wake.wait()
            while self._due:
                key, _ = self._due.popitem(last=False)
                await self._draft_for(key, self._sessions[key])
            self._wake.clear()

    async def _draft_for(self, key: Key, session: _Session) -> None:
        connection, number = key
        tokens = list(session.tokens)
        try:
            tree = await self._forward.run(self._propose, session, tokens)
        except Exception:
            log.exception("drafting failed; the session goes on without")
            if self._sessions.get(key) is session:
                self._forget(key)
            connection.send(Error(number, session.epoch, protocol.REFUSED, "drafting failed"))
            return
        if self._sessions.get(key) is session and len(session.tokens) == len(tokens):
            connection.send(Draft(number, session.epoch, len(tokens), tree))

    def _propose(self, session: _Session, tokens: list[int]) -> TokenTree:
        if session.drafter is None:
            session.drafter = self._make()
        return session.drafter.propose(tokens, session.sampling)


class _Session:
    def __init__(self, epoch: int, tokens: list[int], sampling: Sampling) -> None:
        self.epoch = epoch
        self.tokens = tokens
        self.sampling = sampling
        self.drafter: Drafter | None = None
