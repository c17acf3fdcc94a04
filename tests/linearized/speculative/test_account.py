"""What drafting may lose, and when it is tried again."""

from __future__ import annotations

import itertools
import random

import pytest

from linearized.speculative.account import MOST, START, TRIAL, Account


def rounds(account: Account, count: int, gain, *, promising: bool = True, price=0.5) -> list[bool]:
    """Which of them had drafts; `gain()` is what each of those gave."""
    found = []
    for _ in range(count):
        found.append(account.begin(promising=promising, price=price))
        if found[-1]:
            account.gained(gain())
    return found


def test_no_more_is_lost_than_there_is_credit_for():
    """Whatever is promised: a little at the start, and one round in a hundred."""
    for price in (0.05, 0.5, 2.0):
        found = rounds(Account(), 5000, lambda price=price: -price, price=price)
        assert sum(found) * price <= START + 0.01 * 5000 + TRIAL * price + price


def test_tries_become_rare():
    found = rounds(Account(), 4000, lambda: -0.01, promising=False, price=0.01)
    tried = [i for i, drafts in enumerate(found) if drafts]
    assert 3 * TRIAL <= len(tried) < 0.02 * 4000
    rests = [b - a for a, b in itertools.pairwise(tried) if b - a > 1]
    assert tried[0] <= 20 and rests == sorted(rests) and rests[-1] >= 500


def test_a_good_drafter_goes_on_but_for_turns_without():
    draw = random.Random(0)
    found = rounds(Account(), 3000, lambda: draw.choice([-0.6, 0.4, 1.5]))
    plain = [i for i, drafts in enumerate(found) if not drafts]
    starts = [i for i in plain if i - 1 not in plain]
    assert len(plain) < 0.02 * 3000
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert gaps == sorted(gaps) and gaps[0] > 128


def test_what_was_gained_may_be_lost_again_but_not_more():
    account = Account()
    rounds(account, 100, lambda: 1.0)
    found = rounds(account, 300, lambda: -0.5)
    assert sum(found[:40]) <= MOST / 0.5 + 1


def test_what_does_not_promise_is_not_drafted():
    account = Account()
    assert not account.begin(promising=False, price=0.5)
    assert not account.drafts


def test_an_expensive_try_waits_until_it_can_be_paid():
    found = rounds(Account(), 2000, lambda: -5.0, promising=False, price=5.0)
    first = found.index(True)
    assert first == pytest.approx((TRIAL * 5.0 - START) / 0.01, abs=2)
