"""All target replicas, as the ingress sees them: which one takes the next text, and which one has
read its beginning.

Knows fingerprints, load, and what was read where; knows nothing of what becomes of a text.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Collection, Sequence
from dataclasses import replace

from linearized.speculative.prefixes import SPARED
from serve_apps.generation import Description, Generation
from serve_apps.link.connection import HEARTBEAT_S
from serve_apps.link.discovery import Find, Peers
from serve_apps.link.text_link import TextLink

CROWDED = 1.25
"""Times the mean load of all replicas, and a text more, up to which one is chosen that has read the
text's beginning (Mirrokni et al., "Consistent Hashing with Bounded Loads", 2018)."""
WORTH_IT = 256
"""Tokens at least that a prefix must spare for one replica to lend it to another, …"""
BYTES_A_TOKEN = 2**16
"""… and one for each so many bytes of its state."""


class Targets:
    """Starts with the first call that needs it, on that call's event loop."""

    def __init__(self, find: Find, *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._changed = asyncio.Event()
        """Of replicas, which can be used."""
        self._peers = Peers(
            find,
            lambda endpoint: TextLink(endpoint, changed=self._on_change, heartbeat_s=heartbeat_s),
            kind="target",
        )

    @property
    def links(self) -> list[TextLink]:
        return list(self._peers)

    async def close(self) -> None:
        await self._peers.close()

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
        job: Generation | None = None,
    ) -> TextLink | None:
        """A replica of those that have this fingerprint: the one that has read most of the text's
        beginning, if it has little more to do than the others; else the less loaded of two. One to
        be avoided if there is no other. None: there was none for so long."""
        self._peers.start()
        deadline = time.monotonic() + seconds
        while True:
            able = self._able(fingerprint)
            able = [link for link in able if link not in avoid] or able
            if able:
                reader = _reader(able, job)
                if reader is not None:
                    return reader
                two = random.sample(able, min(2, len(able)))
                return min(two, key=lambda link: link.load)
            self._changed.clear()
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left if left < float("inf") else None):
                    await self._changed.wait()

    async def lend(self, job: Generation, link: TextLink) -> Generation:
        """The job for this replica, with a prefix of it that another one knows, if that spares more
        than it takes to send."""
        if job.state or link.description is None:
            return job
        tokens = job.prompt + job.text
        others = [one for one in self._able(link.description.fingerprint) if one is not link]
        lender = max(others, key=lambda one: one.known.spares(tokens, job.owner), default=None)
        if lender is None:
            return job
        own, theirs = (one.known.spares(tokens, job.owner) for one in (link, lender))
        if theirs - own < max(WORTH_IT, link.description.state_bytes // BYTES_A_TOKEN):
            return job
        return replace(job, lent=await lender.lend(tokens[:theirs], job.owner))

    def others(self, link: TextLink, avoid: Collection[TextLink]) -> bool:
        """Is there another replica, but for those, that could go on with a text of this one?"""
        if link.description is None:
            return False
        able = self._able(link.description.fingerprint)
        return any(one is not link and one not in avoid for one in able)

    def _able(self, fingerprint: str | None) -> list[TextLink]:
        return [
            link
            for link in self._peers
            if link.usable
            and link.description is not None
            and fingerprint in (None, link.description.fingerprint)
        ]

    def _on_change(self) -> None:
        self._peers.turned()
        self._changed.set()


def _reader(links: Sequence[TextLink], job: Generation | None) -> TextLink | None:
    """The one of them that has read most of the text's beginning, unless it is crowded."""
    if job is None or len(links) < 2:
        return None
    tokens = job.prompt + job.text
    spared = {link: link.known.spares(tokens, job.owner) for link in links}
    best = max(spared, key=lambda link: (spared[link], -link.load))
    room = best.description.room if best.description is not None else 1
    crowded = CROWDED * sum(link.load for link in links) / len(links) + 1 / max(1, room)
    return best if spared[best] >= SPARED and best.load <= crowded else None
