"""All target replicas, as the ingress sees them: who they are, and which one takes the next text.

Knows endpoints and load; knows no text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection, Sequence

from serve_apps.generation import Description
from serve_apps.link.connection import HEARTBEAT_S
from serve_apps.link.protocol import Endpoint
from serve_apps.link.text_link import TextLink

FIND_S = 5.0
"""Seconds that naming replicas may take."""
EVERY_S = 1.0
"""Seconds from one time to the next, while there is a link."""
PAUSE_S = 0.1
"""The same, while there is none."""
ASK = 2
"""Replicas that are asked for at once."""

FindTargets = Callable[[], Awaitable[Sequence[Endpoint]]]
"""Names target replicas that live: all of them, or some, at each call maybe others."""

log = logging.getLogger(__name__)


class Targets:
    """Starts with the first call that needs it, on that call's event loop."""

    def __init__(self, find: FindTargets, *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._find = find
        self._heartbeat_s = heartbeat_s
        self._links: dict[Endpoint, TextLink] = {}
        self._changed = asyncio.Event()
        """Of replicas, which can be used."""
        self._lost = asyncio.Event()
        """A link was, since replicas were named last."""
        self._task: asyncio.Task[None] | None = None

    @property
    def links(self) -> list[TextLink]:
        return list(self._links.values())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        links, self._links = self._links, {}
        await asyncio.gather(*(link.close() for link in links.values()))

    async def ready(self) -> Description:
        """Wait for a replica, and describe it."""
        link = await self.pick(seconds=float("inf"))
        assert link is not None and link.description is not None
        return link.description

    async def pick(
        self,
        *,
        seconds: float,
        fingerprint: str | None = None,
        avoid: Collection[TextLink] = (),
    ) -> TextLink | None:
        """The less loaded of two replicas, drawn from those that have this fingerprint; one to be
        avoided if there is no other. None: there was none for so long."""
        self._start()
        deadline = time.monotonic() + seconds
        while True:
            able = self._able(fingerprint)
            able = [link for link in able if link not in avoid] or able
            if able:
                two = random.sample(able, min(2, len(able)))
                return min(two, key=lambda link: link.load)
            self._changed.clear()
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left if left < float("inf") else None):
                    await self._changed.wait()

    def others(self, link: TextLink, avoid: Collection[TextLink]) -> bool:
        """Is there another replica, but for those, that could go on with a text of this one?"""
        if link.description is None:
            return False
        able = self._able(link.description.fingerprint)
        return any(one is not link and one not in avoid for one in able)

    def _able(self, fingerprint: str | None) -> list[TextLink]:
        return [
            link
            for link in self._links.values()
            if link.usable
            and link.description is not None
            and fingerprint in (None, link.description.fingerprint)
        ]

    def _start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._discover())

    async def _discover(self) -> None:
        said = ""
        while True:
            self._lost.clear()
            found = await asyncio.gather(*(self._ask() for _ in range(ASK)), return_exceptions=True)
            endpoints = [one for few in found if not isinstance(few, BaseException) for one in few]
            reason = next((_reason(one) for one in found if isinstance(one, BaseException)), "")
            if reason and not endpoints and reason != said:  # once, not at every attempt
                log.warning("no target replica is named for now: %s", reason)
            said = reason
            if self._take(endpoints):
                continue  # there may be more of them
            pause = EVERY_S if self._able(None) else PAUSE_S
            await asyncio.sleep(PAUSE_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._lost.wait()

    async def _ask(self) -> Sequence[Endpoint]:
        async with asyncio.timeout(FIND_S):
            return await self._find()

    def _take(self, endpoints: Sequence[Endpoint]) -> bool:
        """Link to those that are new; was there one?"""
        new = [one for one in dict.fromkeys(endpoints) if one not in self._links]
        for endpoint in new:
            self._links[endpoint] = TextLink(
                endpoint, changed=self._on_change, heartbeat_s=self._heartbeat_s
            )
        return bool(new)

    def _on_change(self) -> None:
        for endpoint, link in list(self._links.items()):
            if link.gone:
                del self._links[endpoint]
                self._lost.set()
        self._changed.set()


def _reason(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
