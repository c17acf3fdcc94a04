"""What pays is verified, what does not is left alone, and little is lost in finding out."""

from __future__ import annotations

import itertools
import random
import time

import pytest
import torch

from linearized.speculative import Sampling, Text, TokenTree
from linearized.speculative.costs import Clock, Costs, clock_of
from linearized.speculative.planner import Planner

FLAT = Costs((1, 8), (1, 32), ((1.0, 2.0), (2.0, 6.0)))


def clock(costs: Costs = FLAT) -> Clock:
    """It has seen rounds without trees, which took what the table says."""
    found = Clock(costs)
    for batch in range(1, 9):
        for _ in range(3):
            found.took(batch, 0, costs.verify(batch, 1), drafted=False)
    return found


def reach(planner: Planner, one: Text, depth: int) -> float:
    return next(itertools.islice(planner.reach(one), depth - 1, None))


def text() -> Text:
    return Text([1], sampling=Sampling(), max_new_tokens=100)


def rounds(
    planner: Planner,
    right: float,
    count: int,
    drafting: float,
    seed: int = 0,
    clock: Clock | None = None,
    batch: int = 1,
) -> dict:
    """Texts, drafted for by chains whose guesses are right with this probability. Seconds of all
    rounds, tokens, and rounds that were drafted for."""
    draw = random.Random(seed)
    group = [text() for _ in range(batch)]
    seconds, tokens, drafted, depths = 0.0, 0, 0, []
    for _ in range(count):
        depth = planner.depth(group, batch)
        depths.append(depth)
        trees, accepted = [TokenTree.empty] * batch, 0
        if depth:
            drafted += 1
            spent = depth * drafting
            chain = TokenTree.chain([0] * depth, [0.9**level for level in range(1, depth + 1)])
            trees = planner.trim(group, [chain] * batch, batch, spent)
            nodes = sum(map(len, trees)) / batch
            planner.took(batch, depth, spent, levels=depth, nodes=nodes)
            for one, tree in zip(group, trees, strict=True):
                right_here = 0
                while right_here < len(tree) and draw.random() < right:
                    right_here += 1
                planner.observe(one, tree, [0] * right_here + [1], depth)
                accepted += right_here
            seconds += spent
        widest = max(map(len, trees))
        took = FLAT.verify(batch, 1 + widest)
        if clock is not None:
            cold = 1.5 if depths[-2:-1] and depths[-2] else 1.0  # after a round with drafts
            took *= 1.0 if depth else cold
            clock.took(batch, widest, took, drafted=bool(depth))
        if depth:
            planner.gave(batch, batch, tokens=accepted, nodes=widest, seconds=took)
        seconds += FLAT.verify(batch, 1 + widest)
        tokens += batch + accepted
    return {"seconds": seconds, "tokens": tokens, "drafted": drafted, "depths": depths}


@pytest.mark.parametrize("batch", [1, 5])
def test_a_useless_drafter_costs_little(batch):
    """vllm#35387: speculation makes texts slower; vllm#49548: it collapses at five at a time."""
    planner = Planner(clock(), max_depth=8, max_nodes=16)
    rounds(planner, 0.0, 100, drafting=0.2, batch=batch)  # what it takes to find out
    later = rounds(planner, 0.0, 2000, drafting=0.2, seed=1, batch=batch)
    plain = FLAT.verify(batch, 1) / batch
    assert later["seconds"] / later["tokens"] < 1.03 * plain
    assert 0 < later["drafted"] < 40  # tried again now and then


def test_finding_out_is_short():
    planner = Planner(clock(), max_depth=8, max_nodes=16)
    first = rounds(planner, 0.0, 60, drafting=0.2)
    assert first["drafted"] < 12


@pytest.mark.parametrize("right, least", [(0.95, 6), (0.8, 3)])
def test_a_good_drafter_is_used(right, least):
    planner = Planner(clock(), max_depth=8, max_nodes=16)
    rounds(planner, right, 100, drafting=0.1)
    later = rounds(planner, right, 500, drafting=0.1, seed=1)
    assert sorted(later["depths"])[len(later["depths"]) // 2] >= least
    best = max(
        sum(right**level for level in range(depth + 1)) / (depth * 0.1 + FLAT.verify(1, 1 + depth))
        for depth in range(9)
    )
    assert later["tokens"] / later["seconds"] > 0.93 * best


def test_one_that_gets_better_is_found():
    planner = Planner(clock(), max_depth=8, max_nodes=16)
    rounds(planner, 0.0, 300, drafting=0.1)
    later = rounds(planner, 0.9, 1500, drafting=0.1, seed=1)
    assert later["depths"][-1] > 2


def test_texts_have_their_own_estimates():
    planner = Planner(clock(), max_depth=4, max_nodes=16)
    good, bad = text(), text()
    for _ in range(30):
        for one, accepted in ((good, 4), (bad, 0)):
            planner.observe(one, TokenTree.chain([0] * 4), [0] * accepted + [1], 4)
    assert reach(planner, good, 4) > 0.8 > 0.2 > reach(planner, bad, 1)
    assert 0.2 < reach(planner, text(), 1) < 0.8
    trees = [TokenTree.chain([0] * 4)] * 2
    kept = planner.trim([good, bad], trees, 2, 0.0)
    assert len(kept[0]) == 4
    planner.forget(bad)
    assert reach(planner, bad, 1) > 0.2


def test_trees_keep_their_best_nodes():
    """A node is worth its score; a steep cost cuts the tree there."""
    steep = Costs((1,), (1, 2, 3, 4), ((1.0, 1.3, 1.6, 1.9),))
    planner = Planner(clock(steep), max_depth=3, max_nodes=3)
    tree = TokenTree((5, 6, 7), (-1, -1, 0), (0.9, 0.05, 0.6))
    (kept,) = planner.trim([text()], [tree], 1, 0.0)
    assert kept == TokenTree((5, 7), (-1, 0), (0.9, 0.6))
    (kept,) = planner.trim([text()], [TokenTree((5,), (-1,), (0.08,))], 1, 0.0)
    assert len(kept) == 0


def test_guesses_are_trusted_as_often_as_they_were_right():
    """Where the draft is unsure of its favourite and the target takes it all the same."""
    planner = Planner(clock(), max_depth=2, max_nodes=16)
    one = text()
    assert planner.trust(one)(0.36, 0) == pytest.approx(0.6)  # a first choice
    assert planner.trust(one)(0.3, 1) == pytest.approx(0.3)
    tree = TokenTree((5, 6, 7), (-1, -1, 0), (0.3, 0.05, 0.09))  # 7 is found 0.3 probable, too
    for _ in range(200):
        planner.observe(one, tree, [5, 8], 2)
    assert planner.trust(one)(0.3, 0) == pytest.approx(0.5, abs=0.02)  # 5 was right, 7 was not
    assert planner.trust(one)(0.05, 1) < 0.01
    assert planner.trust(text())(0.3, 0) == pytest.approx(0.5, abs=0.03)  # others learn from it
    assert planner.trust(one)(0.3, 1) == pytest.approx(0.3)  # of those nothing is known
    assert planner.trust(one)(0.05, 2) == pytest.approx(0.05)
    for _ in range(200):
        planner.observe(one, tree, [5], 2)  # nobody knows what came after it
    assert planner.trust(one)(0.3, 0) > 0.85


def test_what_is_trusted_is_verified():
    """A wide tree of the unlikely, by its scores; experience has it otherwise."""
    planner = Planner(clock(Costs((1,), (1, 2, 3), ((1.0, 1.3, 1.6),))), max_depth=1, max_nodes=2)
    one = text()
    tree = TokenTree((5, 6), (-1, -1), (0.5, 0.05))
    for _ in range(100):
        planner.observe(one, tree, [6], 1)
    (kept,) = planner.trim([one], [tree], 1, 0.0)
    assert kept == TokenTree((6,), (-1,), (0.05,))


def test_costs_are_interpolated_and_never_fall():
    assert FLAT.verify(1, 1) == 1 and FLAT.verify(8, 32) == 6
    assert FLAT.verify(1, 16) == pytest.approx(1 + 15 / 31)
    assert FLAT.verify(4, 1) == pytest.approx(1 + 3 / 7)
    assert FLAT.verify(1, 63) == pytest.approx(3)  # beyond the table, further along
    seen = []
    costs = Costs.measure(
        lambda batch, nodes: seen.append((batch, nodes)), max_batch=3, max_nodes=5
    )
    assert costs.batches == (1, 2, 3) and costs.nodes == (1, 2, 4, 5)
    assert set(seen) == {(b, n) for b in costs.batches for n in costs.nodes}
    assert all(row == tuple(sorted(row)) for row in costs.seconds)


def test_the_first_rounds_are_without_drafts():
    fresh = Clock(FLAT)
    planner = Planner(fresh, max_depth=8, max_nodes=16)
    for _ in range(3):  # the first one sets something up, and does not count
        assert planner.depth([text()], 1) == 0
        fresh.took(1, 0, 1.0, drafted=False)
    assert planner.depth([text()], 1) > 0
    assert planner.depth([text()] * 2, 2) == 0


@pytest.mark.parametrize("slow", [1.5, 3.0])
def test_slow_first_rounds_do_not_speak_for_drafts_for_good(slow):
    """A neighbour was busy when plain rounds were timed. What they take is looked at again, and
    rounds that follow drafted ones are no measure of it."""
    fresh = Clock(FLAT)
    for _ in range(3):
        fresh.took(1, 0, slow, drafted=False)
    planner = Planner(fresh, max_depth=8, max_nodes=16)
    rounds(planner, 0.1, 200, drafting=0.1, clock=fresh)  # pays by those times only
    later = rounds(planner, 0.1, 1000, drafting=0.1, seed=1, clock=fresh)
    assert later["drafted"] < 60
    assert fresh.seconds(1, 0, drafted=False) == pytest.approx(1.0)


def test_without_drafts_a_round_takes_no_longer_than_with_some():
    fresh = Clock(FLAT)
    for _ in range(3):
        fresh.took(1, 0, 2.0, drafted=False)
    assert fresh.seconds(1, 0, drafted=False) == pytest.approx(2.0)
    for _ in range(3):
        fresh.took(1, 0, 1.2, drafted=True)
    assert fresh.seconds(1, 0, drafted=False) == pytest.approx(1.2)


def test_what_drafts_cost_beyond_the_table_counts():
    """A chain that is always right pays by the table; not where rounds with trees take longer."""
    hidden = clock()
    planner = Planner(hidden, max_depth=1, max_nodes=16)
    one = text()
    for _ in range(50):
        planner.observe(one, TokenTree.chain([0]), [0, 1], 1)
        planner.took(1, 1, 0.1, levels=1, nodes=1)
    assert planner.depth([one], 1) == 1
    for _ in range(5):
        hidden.took(1, 1, FLAT.verify(1, 2) + 1.0, drafted=True)
    longer = 1 + 1 / FLAT.verify(1, 2)
    assert hidden.seconds(1, 3, drafted=True) == pytest.approx(FLAT.verify(1, 4) * longer)
    assert hidden.seconds(1, 0, drafted=False) == pytest.approx(1.0)
    planner.took(1, 1, 0.1, levels=1, nodes=1)
    assert planner.depth([one], 1) == 0


def test_one_slow_call_does_not_count():
    """Neither the first one, which sets something up, nor one that was interrupted."""
    planner = Planner(clock(), max_depth=8, max_nodes=16)
    for seconds in (9.0, 0.1, 0.1, 7.0, 0.1):
        planner.took(1, 4, seconds, levels=2, nodes=4)
        planner.observe(one := text(), TokenTree.chain([0] * 4), [0] * 4 + [1], 4)
        planner.forget(one)
    assert planner.depth([text()], 1) >= 4


def test_a_level_costs_what_its_time_gives_otherwise():
    planner = Planner(clock(), max_depth=1, max_nodes=16)
    assert planner.follow(1) == 0.1  # nothing is known
    for _ in range(6):
        planner.took(1, 1, 0.25, levels=1, nodes=1)
        planner.took(4, 1, 0.5, levels=1, nodes=1)
    for _ in range(100):
        planner.observe(text(), TokenTree.chain([0]), [1], 1)
    planner.depth([text()], 1)  # nothing pays: one token a second
    assert planner.follow(1) == pytest.approx(0.25)
    planner.depth([text()] * 4, 4)
    rate = 4 / FLAT.verify(4, 1)
    assert planner.follow(4) == pytest.approx(0.5 * rate / 4)
    for _ in range(4):
        planner.took(8, 1, 99.0, levels=1, nodes=1)
    assert planner.follow(8) == 1.0


def test_a_devices_clock_is_read_once_it_is_idle(monkeypatch):
    seen = []
    monkeypatch.setattr("torch.accelerator.synchronize", seen.append)
    assert clock_of(torch.device("cpu")) is time.perf_counter
    now = clock_of(torch.device("cuda:1"))
    assert now() <= now() and seen == [torch.device("cuda:1")] * 2
