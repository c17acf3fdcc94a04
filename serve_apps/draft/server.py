"""The draft's end of the link: sessions of all targets, drafted for side by side.

Knows sockets and sessions; of drafters only `foresee` and `forget`, which run in the one thread
that the caller gives. A session's answer goes out when its tree is as deep as was asked for; while
the target verifies it, drafting goes on below it, and what comes of that is sent as well, so that
a text that goes on as foreseen need not wait. What is remembered can always be rebuilt from token
ids.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from linearized.errors import ConfigError
from linearized.speculative import Drafter, Text
from linearized.speculative.record import Record
from serve_apps.draft.session import Session
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

SENT = 96
"""Guesses that a target is told, at most."""

OUTSIDE = "a token is outside the draft's vocabulary"

log = logging.getLogger(__name__)

Key = tuple[Connection, int]


@dataclass(frozen=True, slots=True)
class Load:
    """What targets asked for, within some time."""

    sessions: int
    """Texts."""
    asked: int
    """Trees …"""
    late: int
    """… and how many of those their targets went on without."""
    seconds: float
    """That were spent on them."""


class DraftServer:
    def __init__(
        self,
        make: Callable[[], Drafter],
        *,
        forward: Forward,
        fingerprint: str,
        vocab_size: int,
        tokenizer: str = "",
        max_depth: int = 8,
        max_nodes: int = 64,
        max_sessions: int = 64,
        host: str = "127.0.0.1",
        ports: tuple[int, int] = ANY_PORT,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        """`make` makes the drafter, in the forward thread. It answers with trees of up to
        `max_depth` levels, however many are asked for. Of each text up to `max_nodes` guesses
        are kept. Beyond `max_sessions` the longest unused one is forgotten; its target opens it
        anew if it goes on. `fingerprint`, `vocab_size`, `tokenizer`: see Endpoint."""
        self._make = make
        self._drafter: Drafter | None = None
        self._max_depth = max_depth
        self._max_nodes = max_nodes
        self._forward = forward
        self._fingerprint = fingerprint
        self._vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._max_sessions = max_sessions
        self._listener = Listener(self._listen, host=host, ports=ports, heartbeat_s=heartbeat_s)
        self._sessions: OrderedDict[Key, Session] = OrderedDict()
        """The longest unused one first."""
        self._ended: list[Text] = []
        """Texts that the drafter is to forget."""
        self._record = Record()
        """How often guesses turn out right here."""
        self._heard = False
        """A target has said something that the forward thread does not know of yet."""
        self._asking: set[Key] = set()
        self._asked = self._late = 0
        """As `load` will tell."""
        self.drafting_s = 0.0
        """Seconds spent on drafting so far."""
        self._seconds = self._told = 0.0
        """Spent on trees that targets wait for, so far, and when `load` was called last."""
        self._wake = asyncio.Event()
        self._drafting: asyncio.Task[None] | None = None

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def load(self) -> Load:
        """Since it was asked for last."""
        told, self._told = self._told, self._seconds
        load = Load(len(self._asking), self._asked, self._late, self._told - told)
        self._asking, self._asked, self._late = set(), 0, 0
        return load

    async def start(self) -> Endpoint:
        """Listen.

        Raises:
            ConfigError: none of the ports is free.
        """
        endpoint = await self._listener.start(
            fingerprint=self._fingerprint,
            vocab_size=self._vocab_size,
            tokenizer=self._tokenizer,
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
        self._sessions[key] = Session(
            message, most=self._max_nodes, deepest=self._max_depth, record=self._record
        )
        self._request(key)
        while len(self._sessions) > self._max_sessions:
            self._forget(next(iter(self._sessions)))

    def _problem(self, message: Open) -> str | None:
        if not message.tokens:
            return "there are no tokens to go on from"
        if max(message.tokens) >= self._vocab_size:
            return OUTSIDE
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
            self._forget(key)
            refused = Error(message.session, message.epoch, protocol.REFUSED, OUTSIDE)
            connection.send(refused)
            return
        self._late += session.unanswered
        session.extend(new, message.depth)
        self._request(key)

    def _request(self, key: Key) -> None:
        self._asking.add(key)
        self._asked += 1
        self._sessions.move_to_end(key)
        self._heard = True
        self._wake.set()

    def _forget(self, key: Key) -> None:
        session = self._sessions.pop(key, None)
        if session is not None:
            self._ended.append(session.text)
            self._wake.set()

    async def _draft(self) -> None:
        """As long as there is anything to foresee."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._ended or any(session.waits for session in self._sessions.values()):
                self._heard = False
                ended, self._ended = self._ended, []
                sessions = list(self._sessions.items())
                for _, session in sessions:
                    session.go_on()
                await self._forward.run(self._look, [session for _, session in sessions], ended)
                for key, session in sessions:
                    if self._sessions.get(key) is session:
                        self._tell(key, session)

    def _tell(self, key: Key, session: Session) -> None:
        connection, number = key
        if session.failed:
            self._forget(key)
            failed = Error(number, session.epoch, protocol.REFUSED, "drafting failed")
            connection.send(failed)
        elif session.due:
            tree, base = session.foresight.tree().best(SENT), session.foresight.length
            connection.send(Draft(number, session.epoch, base, tree))
            session.told()

    def _look(self, sessions: Sequence[Session], ended: Sequence[Text]) -> None:
        """In the forward thread: look ahead, for those first whose targets wait, until a target is
        to be told something, or has said something."""
        if self._drafter is None:
            self._drafter = self._make()
        for text in ended:
            self._drafter.forget(text)
        while not any(one.due or one.failed for one in sessions):
            waiting = [one for one in sessions if one.owed]
            group = waiting or [one for one in sessions if not one.done]
            if not group:
                break
            began = time.perf_counter()
            self._foresee(self._drafter, group, wide=not waiting)
            spent = time.perf_counter() - began
            self.drafting_s += spent
            if waiting:
                self._seconds += spent
            if self._heard:  # after a look: targets who talk all the time do not keep it from any
                break

    def _foresee(self, drafter: Drafter, sessions: Sequence[Session], *, wide: bool) -> None:
        try:
            foresights = [session.foresight for session in sessions]
            drafter.foresee(foresights, [session.depth for session in sessions], wide=wide)
        except Exception:
            if len(sessions) > 1:  # let the others have theirs
                for session in sessions:
                    self._foresee(drafter, [session], wide=wide)
                return
            log.exception("drafting failed; the session goes on without")
            sessions[0].failed = True
        for session in sessions:
            session.looked()
