"""The ingress's end of the link to one target replica, for as long as its connection lives."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

from linearized.speculative import Alternatives
from serve_apps.generation import (
    Delta,
    Description,
    Event,
    Finished,
    Generation,
    Left,
    Refused,
    Started,
)
from serve_apps.link.connection import HEARTBEAT_S, Connection, LinkError, dial
from serve_apps.link.known import Known
from serve_apps.link.protocol import Endpoint, GoAway, Message, ProtocolError
from serve_apps.link.texts import (
    MAX_STATE,
    WINDOW,
    Cancel,
    Failed,
    Leave,
    Lend,
    Lent,
    More,
    PromptPart,
    Said,
    StatePart,
    Status,
    Submit,
    parts,
)

LEAVE_S = 10.0
"""Seconds within which a state is handed over, or the text is read again."""
LEND_S = 2.0
"""The same for a prefix."""

log = logging.getLogger(__name__)


class TextLink:
    """A replica, as the relay sees it."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        changed: Callable[[], None],
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        """Connects by itself. `changed` is called when the replica can be used, or no longer."""
        self.endpoint = endpoint
        self.leaving = False
        """Has it asked to go on elsewhere?"""
        self.description: Description | None = None
        """What it has said of itself last."""
        self.known = Known()
        """What it has read."""
        self._changed = changed
        self._heartbeat_s = heartbeat_s
        self._connection: Connection | None = None
        self._texts: dict[int, _Events] = {}
        self._lending: dict[int, _Prefix] = {}
        self._numbers = itertools.count()
        self._handing = asyncio.Lock()
        self._task = asyncio.create_task(self._run())

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def gone(self) -> bool:
        return self._task.done()

    @property
    def usable(self) -> bool:
        return self.connected and self.description is not None and not self.leaving

    @property
    def num_texts(self) -> int:
        """Those that are read here."""
        return len(self._texts)

    @property
    def load(self) -> float:
        """Texts for each that it goes on with at a time."""
        if self.description is None:
            return 0.0
        return max(self.description.texts, len(self._texts)) / max(1, self.description.room)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def complete(self, job: Generation) -> AsyncGenerator[Event, None]:
        """Events of one text, up to Finished or Refused. Whoever closes it early ends the text.

        Raises:
            LinkError: the replica does not go on with it; another one may.
        """
        connection = self._connection
        if connection is None:
            raise LinkError("the connection has ended")
        number = next(self._numbers)
        self._texts[number] = events = _Events(job)
        ended, taken, tokens = False, 0, [*job.prompt, *job.text]
        try:
            await self._submit(connection, number, job)
            while not ended:
                event = await events.queue.get()
                ended = isinstance(event, Finished | Left | Refused | LinkError)
                match event:
                    case LinkError():
                        raise event
                    case Delta():
                        tokens += event.tokens
                    case Started() | Finished():
                        self.known.note(tokens, job.owner)
                yield event
                taken += 1
                if taken == WINDOW // 2:
                    connection.send(More(number, taken))
                    taken = 0
        except ProtocolError as error:
            ended = True
            yield Refused(status=413, message=str(error), code="request_too_large")
        finally:
            del self._texts[number]
            if events.impatient is not None:
                events.impatient.cancel()
            if not ended:
                connection.send(Cancel(number))

    def leave(self, job: Generation) -> None:
        """Ask for the state of this text, which is being completed: its last event is Left then. If
        that does not come in time, LinkError is raised there."""
        for number, events in self._texts.items():
            if events.job is job and events.impatient is None and self._connection is not None:
                self._connection.send(Leave(number))
                late = LinkError("the replica does not hand the text over")
                loop = asyncio.get_running_loop()
                events.impatient = loop.call_later(LEAVE_S, events.queue.put_nowait, late)

    async def lend(self, tokens: Sequence[int], owner: str) -> bytes:
        """The state behind the longest prefix of a text that the replica knows, for another one.
        Empty: it knows none, or does not say so in time."""
        connection = self._connection
        if connection is None:
            return b""
        number = next(self._numbers)
        self._lending[number] = prefix = _Prefix()
        try:
            connection.send(Lend(number, tuple(tokens), owner))
            async with asyncio.timeout(LEND_S):
                return await prefix.whole
        except (TimeoutError, ProtocolError):
            return b""
        finally:
            del self._lending[number]

    async def _submit(self, connection: Connection, number: int, job: Generation) -> None:
        state = job.state or job.lent
        if state:
            async with self._handing:  # one state at a time, which is all that a target keeps
                for part in parts(number, state):
                    connection.send(part)
                    await connection.room()
        lent = bool(state and not job.state)
        connection.send(Submit(number, replace(job, state=b"", lent=b""), lent))

    async def _run(self) -> None:
        reason = LinkError("the target's connection has ended")
        try:
            connection = await dial(self.endpoint, heartbeat_s=self._heartbeat_s)
            self._connection = connection
            try:
                while True:
                    self._take(await connection.receive())
            finally:
                await connection.abort()
        except (LinkError, ProtocolError) as error:
            log.info("link to a target: %s", error)
            reason = LinkError(str(error))
        finally:
            self._connection = None
            for text in self._texts.values():
                text.queue.put_nowait(reason)
            for prefix in self._lending.values():
                prefix.end()
            asyncio.get_running_loop().call_soon(self._changed)  # once this task is done

    def _take(self, message: Message) -> None:
        match message:
            case Said(number, event):
                if number in self._texts:
                    self._texts[number].add(event)
            case PromptPart(number, logprobs):
                if number in self._texts:
                    self._texts[number].prompt += logprobs
            case StatePart(number, state):
                if number in self._texts:
                    self._texts[number].add_state(state)
                if number in self._lending:
                    self._lending[number].add(state)
            case Lent(number):
                if number in self._lending:
                    self._lending[number].end(known=True)
            case Failed(number, reason):
                if number in self._texts:
                    self._texts[number].queue.put_nowait(LinkError(reason))
            case Status(description):
                first, self.description = self.description is None, description
                if first:
                    self._changed()
            case GoAway():
                self.leaving = True
                self._changed()
            case _:
                raise LinkError(f"a target does not send {type(message).__name__}")


class _Prefix:
    """That the replica was asked for."""

    def __init__(self) -> None:
        self.whole: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._state = bytearray()

    def add(self, part: bytes) -> None:
        if len(self._state) + len(part) > MAX_STATE:
            raise LinkError("a target does not lend a state as large as that")
        self._state += part

    def end(self, *, known: bool = False) -> None:
        if not self.whole.done():
            self.whole.set_result(bytes(self._state) if known else b"")


class _Events:
    """Of one text, as they come. The target stops at WINDOW of them that nobody has taken."""

    def __init__(self, job: Generation) -> None:
        self.job = job
        self.queue: asyncio.Queue[Event | LinkError] = asyncio.Queue()
        self.prompt: list[Alternatives | None] = []
        self.impatient: asyncio.TimerHandle | None = None
        """Once the replica was asked to hand the text over."""
        self._state = bytearray()

    def add_state(self, part: bytes) -> None:
        if self.impatient is None or len(self._state) + len(part) > MAX_STATE:
            raise LinkError("a target does not send a state that nobody has asked for")
        self._state += part

    def add(self, event: Event) -> None:
        if self.queue.qsize() > 2 * WINDOW:
            raise LinkError("a target does not send more than it was allowed")
        if isinstance(event, Started) and self.prompt:
            logprobs, self.prompt = tuple(self.prompt), []
            event = Started(cached_tokens=event.cached_tokens, prompt_logprobs=logprobs)
        if isinstance(event, Left):
            event = Left(state=bytes(self._state))
        self.queue.put_nowait(event)
