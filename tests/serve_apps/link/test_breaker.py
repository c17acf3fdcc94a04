"""When a peer is left alone, and when it is tried again."""

from __future__ import annotations

import pytest

from serve_apps.link import breaker
from serve_apps.link.breaker import FAILURES, Breaker


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(breaker.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(breaker, "PAUSE_S", (1.0, 3.0))
    return Clock()


def test_a_few_failures_in_a_row_open_it(clock):
    it = Breaker(now=clock)
    for _ in range(FAILURES - 1):
        it.failed()
    it.succeeded()
    for _ in range(FAILURES - 1):
        it.failed()
    assert it.allows and it.left_s == 0
    it.failed()
    assert not it.allows and it.left_s == 1.0


def test_each_trial_that_fails_doubles_the_pause(clock):
    it = Breaker(now=clock)
    it.failed(at_once=True)
    for pause in (1.0, 2.0, 3.0, 3.0):
        assert it.left_s == pause
        it.failed()  # what was under way when it opened: says nothing new
        assert it.left_s == pause
        clock.now += pause
        assert it.allows
        it.failed()
        assert not it.allows


def test_one_success_is_enough(clock):
    it = Breaker(now=clock)
    it.failed(at_once=True)
    clock.now += 1.0
    it.succeeded()
    it.failed()
    assert it.allows
    it.failed(at_once=True)
    assert it.left_s == 1.0
