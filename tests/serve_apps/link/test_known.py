"""What an ingress remembers of what replicas have read."""

from __future__ import annotations

from serve_apps.link import known
from serve_apps.link.known import Known


def test_the_longest_beginning_counts_and_only_the_owners():
    it = Known()
    it.note([1, 2, 3, 4], "a")
    it.note([1, 2, 9], "a")
    it.note([1, 2, 3, 4, 5, 6], "b")
    assert it.spares([1, 2, 3, 4, 5, 6], "a") == 4
    assert it.spares([1, 2, 9, 9], "a") == 3
    assert it.spares([1, 2], "a") == 2
    assert it.spares([1, 2, 3, 4, 5, 6], "b") == 6
    assert it.spares([2, 1], "a") == it.spares([], "a") == it.spares([1], "c") == 0


def test_what_was_read_longest_ago_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(known, "MOST_TEXTS", 2)
    it = Known()
    for token in (1, 2):
        it.note([token], "")
    it.note([1], "")
    it.note([3], "")
    assert [it.spares([token], "") for token in (1, 2, 3)] == [1, 0, 1]
    monkeypatch.setattr(known, "MOST_TEXTS", 99)
    monkeypatch.setattr(known, "MOST_TOKENS", 10)
    it.note([4] * 9, "")
    assert [it.spares([token], "") for token in (1, 3, 4)] == [0, 1, 1]
    it.note([4] * 9, "")
    assert it.spares([3], "") == 1
    it.note([5] * 11, "")
    assert it.spares([5], "") == 0
