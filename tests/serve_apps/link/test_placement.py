"""Sessions go to the same peer as long as it has room, and none gets many more than its share."""

from __future__ import annotations

import math
from collections import Counter

from serve_apps.link.placement import SLACK, place

PEERS = ["a", "b", "c", "d"]


def spread(sessions: int, peers: list[str]) -> dict[int, str]:
    loads = dict.fromkeys(peers, 0)
    placed = {}
    for session in range(sessions):
        placed[session] = place(str(session), loads)
        loads[placed[session]] += 1
    return placed


def test_nobody_has_many_more_than_their_share():
    for sessions in (1, 2, 4, 7, 40, 400):
        for peers in (PEERS[:1], PEERS[:3], PEERS):
            most = math.ceil(SLACK * sessions / len(peers))
            assert max(Counter(spread(sessions, peers).values()).values()) <= most


def test_few_sessions_move_when_a_peer_comes():
    before, after = spread(400, PEERS[:3]), spread(400, PEERS)
    moved = [one for one in before if before[one] != after[one] != "d"]
    assert 60 < Counter(after.values())["d"] <= 125
    assert len(moved) < 40


def test_the_same_session_goes_to_the_same_peer():
    assert {place("x", dict.fromkeys(PEERS, 0)) for _ in range(5)} == {
        place("x", dict.fromkeys(reversed(PEERS), 0))
    }


def test_without_peers_there_is_no_place():
    assert place("x", {}) is None
