"""Follows one text from replica to replica, so that whoever reads it never notices.

Keeps what was asked for and what was sent. If a replica dies, hangs or leaves, another one goes on
from there: a text depends on model, prompt, settings and seed only. The last of what was sent is
asked for once more; what comes must be the same, and is not sent again. Knows events; knows neither
sockets nor models.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

from linearized.errors import LinearizedError
from linearized.speculative import TokenTree
from serve_apps import metrics
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
from serve_apps.http.streams import TargetLost
from serve_apps.link.connection import LinkError
from serve_apps.logs import REQUEST
from serve_apps.metrics import Meter

PATIENCE_S = 60.0
MAX_FAILURES = 4
"""How often in a row a text may be lost without getting on."""
HAND_OVER = 128
"""Tokens that are read again rather than that a state is handed over."""
PAUSE_S, LONGEST_S = 0.1, 2.0
"""Before a replica that could not go on with a text is asked again; doubles."""

log = logging.getLogger(__name__)


class Replica(Protocol):
    """One target replica."""

    description: Description | None

    @property
    def leaving(self) -> bool:
        """Has it asked to go on elsewhere?"""
        ...

    def complete(self, job: Generation) -> AsyncGenerator[Event, None]:
        """Raises LinkError where it does not go on; another replica may."""
        ...

    def leave(self, job: Generation) -> None:
        """Ask for the state of this text, which is being completed. Its last event is Left then."""
        ...


R = TypeVar("R", bound=Replica)


class Replicas(Protocol[R]):
    """All that there are."""

    async def pick(
        self, *, seconds: float, fingerprint: str | None, avoid: Collection[R], job: Generation
    ) -> R | None: ...

    async def lend(self, job: Generation, link: R, /) -> Generation:
        """The job with what other replicas know of it, if this one knows less."""
        ...

    def others(self, link: R, avoid: Collection[R], /) -> bool: ...

    async def ready(self) -> Description: ...

    async def close(self) -> None: ...


class Relay(Generic[R]):
    """A `Target` that lives as long as one replica of the same model does."""

    def __init__(
        self,
        replicas: Replicas[R],
        *,
        patience_s: float = PATIENCE_S,
        meter: Meter | None = None,
    ) -> None:
        """`patience_s` is how long a text waits for a replica to go on with it."""
        self._replicas = replicas
        self._patience_s = patience_s
        self._meter = meter or Meter()
        self.moved = 0
        """Texts that went on elsewhere, so far."""

    async def ready(self) -> Description:
        return await self._replicas.ready()

    async def close(self) -> None:
        await self._replicas.close()

    async def complete(self, job: Generation) -> AsyncGenerator[Event, None]:
        """Events of one text, up to Finished or Refused.

        Raises:
            TargetLost: no replica goes on with a text that had been started.
        """
        text = _Text(replace(job, request=REQUEST.get() or ""))
        avoid: list[R] = []
        fingerprint: str | None = None
        deadline, pause = time.monotonic() + self._patience_s, 0.0
        lost: float | None = None
        while True:
            await asyncio.sleep(pause)
            left = max(0.0, deadline - time.monotonic())
            rest = text.rest()
            replica = await self._replicas.pick(
                seconds=left, fingerprint=fingerprint, avoid=avoid, job=rest
            )
            if replica is None or text.failures > MAX_FAILURES:
                problem = f"no replica of the model goes on with this text: {text.problem}"
                if text.started:
                    raise TargetLost(problem)
                yield Refused(status=503, message=problem, code="unavailable", retry_after=1)
                return
            if fingerprint is None and replica.description is not None:
                fingerprint = replica.description.fingerprint
            before, rest = text.num_tokens, await self._replicas.lend(rest, replica)
            try:
                async with aclosing(replica.complete(rest)) as events:
                    async for event in events:
                        if self._is_full(event, text, replica, avoid):
                            break
                        for told in text.take(event):
                            if lost is not None:
                                self._meter.observe(metrics.GAP, time.monotonic() - lost)
                                lost = None
                            yield told
                        if text.ended:
                            return
                        if replica.leaving and self._replicas.others(replica, ()):
                            if text.num_read < HAND_OVER:
                                raise LinkError("the replica is about to end")
                            replica.leave(rest)
                    else:
                        raise LinkError("the replica ended without a word")
                text.problem = "all replicas are full"
            except _HandedOverError as left:
                text.take_over(left.state)
                self.moved += 1
                log.warning("a text goes on elsewhere from its state of %d bytes", len(left.state))
            except LinkError as error:
                text.lose(str(error), got_on=text.num_tokens > before)
                self.moved += 1
                self._meter.add(metrics.FAILOVERS)
                lost = lost or time.monotonic()
                log.warning("a text goes on elsewhere after %d tokens: %s", text.num_tokens, error)
            except _DiffersError as difference:
                log.warning("a replay disagrees with what was sent: %s", difference)
                text.trust()
                continue
            if text.num_tokens > before:
                avoid, pause = [], 0.0
                deadline = time.monotonic() + self._patience_s
            elif replica in avoid:
                pause = min(2 * pause or PAUSE_S, LONGEST_S)
            avoid.append(replica)

    def _is_full(self, event: Event, text: _Text, replica: R, avoid: list[R]) -> bool:
        """A text that has been started waits for room; others do if another replica has some."""
        if not isinstance(event, Refused) or event.status != 503:
            return False
        return text.started or self._replicas.others(replica, avoid)


class _DiffersError(LinearizedError):
    """A replica says something else than was sent already."""


class _HandedOverError(LinearizedError):
    """A replica ends, and has handed over the text's state."""

    def __init__(self, state: bytes) -> None:
        super().__init__("the replica has handed the text over")
        self.state = state


class _Text:
    """What was sent of one text."""

    def __init__(self, job: Generation) -> None:
        self._job = job
        self._tokens: list[int] = []
        self._last = 0, ""
        """Number of tokens before the last Delta that was sent, and its text."""
        self._replayed: list[int] = []
        """Tokens that were sent and are to come once more, …"""
        self._repeated = ""
        """… and their text."""
        self._heard = ""
        """As much of that as has come."""
        self._state = b""
        """From which the next replica goes on."""
        self._before = _Count()
        """What replicas that are gone have done."""
        self._here = _Count()
        self._again: Counter[int] = Counter()
        """Accepted tokens by level that have come twice."""
        self.started = False
        self.ended = False
        self.failures = 0
        """In a row, without a token between them."""
        self.problem = "there is none"

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def num_read(self) -> int:
        """Tokens that the replica has in its state, more or less."""
        return len(self._job.prompt) + len(self._tokens)

    def rest(self) -> Generation:
        """What to ask a replica for."""
        sure, text = self._last
        self._replayed, self._repeated, self._heard = self._tokens[sure:], text, ""
        state, self._state = self._state, b""
        return replace(self._job, text=(*self._job.text, *self._tokens[:sure]), state=state)

    def trust(self) -> None:
        """Go on from what was sent, without a look at it."""
        self._last = len(self._tokens), ""
        self._leave()

    def take_over(self, state: bytes) -> None:
        """Go on from this state; without one, from tokens that are read again."""
        self._state = state
        if state:
            self.trust()
        else:
            self._leave()

    def lose(self, problem: str, *, got_on: bool) -> None:
        self.problem = problem
        self.failures = 1 if got_on else self.failures + 1
        self._leave()

    def take(self, event: Event) -> list[Event]:
        """What of it is new.

        Raises:
            _DiffersError: it is not what was sent before. _HandedOverError: the replica is done
                with it.
        """
        match event:
            case Started():
                first, self.started = not self.started, True
                return [event] if first else []
            case Delta():
                return self._go_on(event)
            case Finished():
                if self._replayed:
                    raise _DiffersError(f"the text ends at token {self.num_tokens}")
                self.ended = True
                return [self._whole(event)]
            case Refused():
                self.ended = True
                if not self.started:
                    return [event]
                return [self._whole(Finished(reason="error", rounds=0, error=event.message))]
            case Left():
                raise _HandedOverError(event.state)

    def _go_on(self, delta: Delta) -> list[Event]:
        self._here.add(delta)
        num = min(len(self._replayed), len(delta.tokens))
        if list(delta.tokens[:num]) != self._replayed[:num]:
            place = self.num_tokens - len(self._replayed)
            raise _DiffersError(f"the tokens from {place} on")
        del self._replayed[:num]
        self._again.update(range(1, min(delta.accepted, num) + 1))
        text = self._heard + delta.text
        if self._replayed:
            self._heard = text
            return []
        if not text.startswith(self._repeated):
            raise _DiffersError(f"the text at token {self.num_tokens}")
        new = Delta(
            text=text[len(self._repeated) :],
            tokens=delta.tokens[num:],
            accepted=max(0, delta.accepted - num),
            logprobs=delta.logprobs[num:],
            tree=TokenTree.empty if num else delta.tree,  # of a round that was seen in part: none
        )
        self._repeated = self._heard = ""
        if not new.tokens:
            self._last = self._last[0], self._last[1] + new.text
        else:
            self._last = self.num_tokens, new.text
            self._tokens += new.tokens
        return [new] if new.tokens or new.text else []

    def _leave(self) -> None:
        """Count what a replica has done that will not say so itself."""
        self._before.rounds += self._here.rounds
        self._before.accepted += self._here.accepted
        self._here = _Count()

    def _whole(self, end: Finished) -> Finished:
        """With what replicas that are gone have done."""
        before = Counter(self._before.accepted)
        before.subtract(self._again)
        return replace(
            end,
            rounds=end.rounds + self._before.rounds,
            drafted=_levels(end.drafted, before),
            accepted=_levels(end.accepted, before),
        )


class _Count:
    """What can be seen of one replica's work on a text."""

    def __init__(self) -> None:
        self.rounds = 0
        self.accepted: Counter[int] = Counter()
        """By level."""

    def add(self, delta: Delta) -> None:
        self.rounds += bool(delta.tokens)
        self.accepted.update(range(1, delta.accepted + 1))


def _levels(some: tuple[int, ...], more: Counter[int]) -> tuple[int, ...]:
    others = [more[level] for level in range(1, max(more, default=0) + 1)]
    return tuple(map(sum, itertools.zip_longest(some, others, fillvalue=0)))
