"""Which of several peers a session goes to. Knows names and numbers of sessions.

Rendezvous hashing (Thaler and Ravishankar, 1998) with bounded loads (Mirrokni, Thorup and
Zadimoghaddam, 2018): when a peer comes or goes, few sessions have to move, and none has many more
than its share.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

SLACK = 1.25
"""Times its share that a peer may have."""

Peer = TypeVar("Peer", bound=Hashable)


def place(session: str, loads: Mapping[Peer, int]) -> Peer | None:
    """A peer for one more session, of those that have so many; None if there is no peer. The same
    session goes to the same peer as long as that has room."""
    if not loads:
        return None
    most = math.ceil(SLACK * (sum(loads.values()) + 1) / len(loads))
    free = [peer for peer, load in loads.items() if load < most]
    return max(free, key=lambda peer: _weight(session, peer))


def _weight(session: str, peer: Hashable) -> bytes:
    return hashlib.blake2b(f"{session}\0{peer!r}".encode(), digest_size=8).digest()
