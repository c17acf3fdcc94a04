"""All target replicas, as the ingress sees them: which one takes the next text.

Knows fingerprints and load; knows no text.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Collection

from serve_apps.generation import Description
from serve_apps.link.connection import HEARTBEAT_S
from serve_apps.link.discovery import Find, Peers
from serve_apps.link.text_link import TextLink


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
    ) -> TextLink | None:
        """The less loaded of two replicas, drawn from those that have this fingerprint; one to be
        avoided if there is no other. None: there was none for so long."""
        self._peers.start()
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
            for link in self._peers
            if link.usable
            and link.description is not None
            and fingerprint in (None, link.description.fingerprint)
        ]

    def _on_change(self) -> None:
        self._peers.turned()
        self._changed.set()
