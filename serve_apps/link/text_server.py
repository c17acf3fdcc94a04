"""The target's end of the link to the ingress: texts of all its peers, side by side.

Knows sockets and flow control; of the target only that it completes texts. A text that nobody reads
waits, and holds up no other; a peer that is gone leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from serve_apps.generation import Description, Event, Generation, Left
from serve_apps.link.connection import HEARTBEAT_S, Connection, LinkError
from serve_apps.link.listener import ANY_PORT, Listener
from serve_apps.link.protocol import Endpoint, GoAway, Message
from serve_apps.link.texts import (
    MAX_STATE,
    WINDOW,
    Cancel,
    Failed,
    Leave,
    Lend,
    Lent,
    More,
    Said,
    StatePart,
    Status,
    Submit,
    parts,
    said,
)
from serve_apps.logs import REQUEST

STATUS_S = 0.25
"""Seconds between two looks at what peers should know of the target."""
DRAIN_S = 0.02
MAX_LENDING = 8
"""Prefixes that one peer may wait for. To one more it is said that nothing is known."""

log = logging.getLogger(__name__)


class Completes(Protocol):
    """A target replica."""

    def complete(self, job: Generation) -> AsyncGenerator[Event, None]: ...

    def leave(self, job: Generation) -> None:
        """Stop with this text, which is being completed: its last event is Left, with its state."""
        ...

    async def lend(self, tokens: Sequence[int], owner: str) -> bytes:
        """The state behind the longest prefix that is known of the owner's; empty: none is."""
        ...

    async def ready(self) -> Description: ...

    async def check_health(self) -> None: ...


class TextServer:
    def __init__(
        self,
        target: Completes,
        *,
        host: str = "127.0.0.1",
        ports: tuple[int, int] = ANY_PORT,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._target = target
        self._listener = Listener(self._serve, host=host, ports=ports, heartbeat_s=heartbeat_s)
        self._started: asyncio.Task[Endpoint] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._status: Description | None = None
        self._leaving = False
        self._handing = asyncio.Lock()
        self._num_texts = 0

    @property
    def num_texts(self) -> int:
        return self._num_texts

    async def endpoint(self) -> Endpoint:
        """Where ingresses connect to. The first call waits until the target is warm."""
        if self._started is None:
            self._started = asyncio.create_task(self._start())
        return await asyncio.shield(self._started)

    async def drain(self, seconds: float) -> None:
        """Ask all peers to go on elsewhere with their texts, and wait until they have, or for so
        long. No further texts are taken."""
        self._leave()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._num_texts:
                    await asyncio.sleep(DRAIN_S)

    async def close(self) -> None:
        tasks = [task for task in (self._started, self._watching) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._listener.close()

    async def _start(self) -> Endpoint:
        self._status = await self._target.ready()
        endpoint = await self._listener.start(
            fingerprint=self._status.fingerprint, vocab_size=self._status.vocab_size
        )
        self._watching = asyncio.create_task(self._watch())
        return endpoint

    async def _watch(self) -> None:
        """Tell the peers what has changed, and that they should leave if the target is ill."""
        while True:
            await asyncio.sleep(STATUS_S)
            try:
                await self._target.check_health()
            except Exception as error:
                if not self._leaving:
                    log.error("this target does not go on: %s", error)
                self._leave()
                continue
            status = await self._target.ready()
            if status != self._status:
                self._status = status
                for connection in self._listener.connections:
                    connection.send(Status(status))

    def _leave(self) -> None:
        if not self._leaving:
            self._leaving = True
            for connection in self._listener.connections:
                connection.send(GoAway())

    async def _serve(self, connection: Connection) -> None:
        assert self._status is not None
        connection.send(GoAway() if self._leaving else Status(self._status))
        peer = _Peer(connection)
        try:
            while True:
                self._take(peer, await connection.receive())
        finally:
            tasks = [*(text.task for text in peer.texts.values()), *peer.lending]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, peer: _Peer, message: Message) -> None:
        texts = peer.texts
        match message:
            case Submit(number) if number in texts:
                raise LinkError(f"an ingress does not submit text {number} twice")
            case Submit(number) if self._leaving:
                peer.states.pop(number, None)
                peer.connection.send(Failed(number, "this target is about to end"))
            case Submit(number, job, lent):
                state = bytes(peer.states.pop(number, b""))
                given = replace(job, lent=state) if lent else replace(job, state=state)
                texts[number] = text = _Text(given)
                text.task = asyncio.create_task(self._say(peer, number, text))
            case StatePart(number, part):
                peer.keep(number, part)
            case Cancel(number):
                peer.states.pop(number, None)
                if number in texts:
                    texts[number].task.cancel()
            case Leave(number):
                if number in texts:
                    self._target.leave(texts[number].job)
            case Lend(number) if len(peer.lending) >= MAX_LENDING:
                peer.connection.send(Lent(number))
            case Lend():
                task = asyncio.create_task(self._lend(peer.connection, message))
                peer.lending.add(task)
                task.add_done_callback(peer.lending.discard)
            case More(number, events):
                if number in texts:
                    texts[number].allow(events)
            case _:
                raise LinkError(f"an ingress does not send {type(message).__name__}")

    async def _say(self, peer: _Peer, number: int, text: _Text) -> None:
        connection = peer.connection
        if text.job.request:
            REQUEST.set(text.job.request)  # for all that is logged in this task
        self._num_texts += 1
        try:
            async with aclosing(self._target.complete(text.job)) as events:
                async for event in events:
                    await text.turn()
                    if isinstance(event, Left):
                        await self._hand_over(connection, number, event)
                        return
                    first, *more = said(number, event)
                    connection.send(first)
                    for message in more:
                        await asyncio.sleep(0)  # each takes milliseconds to write
                        connection.send(message)
        except Exception as error:
            log.exception("a text ends here; its ingress may go on with it elsewhere")
            reason = str(error).split("\n")[0] or type(error).__name__
            connection.send(Failed(number, reason[:500]))
        finally:
            self._num_texts -= 1
            del peer.texts[number]

    async def _lend(self, connection: Connection, asked: Lend) -> None:
        try:
            state = await self._target.lend(asked.tokens, asked.owner)
        except Exception:  # the other target reads all of the text
            log.exception("a prefix could not be lent")
            state = b""
        with contextlib.suppress(LinkError):
            await self._send(connection, asked.text, state, Lent(asked.text))

    async def _hand_over(self, connection: Connection, number: int, left: Left) -> None:
        await self._send(connection, number, left.state, Said(number, Left()))

    async def _send(
        self, connection: Connection, number: int, state: bytes, end: Said | Lent
    ) -> None:
        """State by state, or a peer would look as if it did not read."""
        async with self._handing:
            for part in parts(number, state if len(state) <= MAX_STATE else b""):
                connection.send(part)
                await connection.room()
            connection.send(end)


class _Peer:
    """An ingress."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.texts: dict[int, _Text] = {}
        self.states: dict[int, bytearray] = defaultdict(bytearray)
        """As far as they have come, of texts that will be submitted."""
        self.lending: set[asyncio.Task[None]] = set()

    def keep(self, number: int, part: bytes) -> None:
        if sum(map(len, self.states.values())) + len(part) > MAX_STATE:
            raise LinkError("an ingress does not hand over so many states at once")
        self.states[number] += part


class _Text:
    task: asyncio.Task[None]

    def __init__(self, job: Generation) -> None:
        self.job = job
        self._room = asyncio.Semaphore(WINDOW)

    async def turn(self) -> None:
        """Wait until one more event may be sent."""
        await self._room.acquire()

    def allow(self, events: int) -> None:
        for _ in range(events):
            self._room.release()
