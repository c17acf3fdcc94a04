"""How long a round waits for drafts, and which texts are drafted for by whom."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from linearized.speculative import Ask, Drafter, Sampling, Text, TokenTree
from serve_apps.target.speculator import REST_S, RemoteDrafter, Speculator


class Links:
    """Time passes only while somebody waits, and then what is told to happens."""

    def __init__(self):
        self.now, self.events, self.sessions, self.opens = 0.0, [], {}, True
        self.arrived = self

    def session(self, text):
        self.sessions[text] = Session(self, text)
        return self.sessions[text]

    def wait(self, seconds):
        assert seconds > 0 and self.now < 60
        until = self.now + seconds
        for at, event in sorted(self.events, key=lambda one: one[0]):
            if self.now <= at <= until:
                self.now = at
                self.events.remove((at, event))
                event()
                return
        self.now = until

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class Session:
    def __init__(self, links, text):
        self.links, self.text = links, text
        self.orders, self.tree, self.ordered = [], TokenTree.empty, 0
        self.open, self.coming = links.opens, True
        self.closed = False

    def order(self, depth):
        self.orders.append((len(self.text.tokens), depth))
        self.ordered = depth

    def awaited(self, now):
        return self.coming

    def close(self):
        self.closed = True

    def goes(self, after, *, alone):
        """Its replica does, and perhaps there is no other."""

        def event():
            self.ordered, self.open = 0, not alone

        self.links.events.append((self.links.now + after, event))

    def comes(self, after, depth):
        def event():
            self.tree = TokenTree.chain(range(depth), [0.9] * depth)
            self.coming = depth < self.ordered

        self.links.events.append((self.links.now + after, event))


def text() -> Text:
    return Text([1, 2], sampling=Sampling(), max_new_tokens=50)


@contextlib.asynccontextmanager
async def drafting(count: int = 1):
    links = Links()
    drafter = RemoteDrafter(links, depth=8, now=lambda: links.now)
    texts = [text() for _ in range(count)]
    for one in texts:
        drafter.open(one)
    yield links, drafter, texts, [links.sessions[one] for one in texts]


def ask(one: Text, depth: int, *worth: float) -> Ask:
    return Ask(one, depth, 16, worth=worth or None)


async def test_nobody_waits_longer_than_the_tree_is_worth():
    async with drafting() as (links, drafter, (one,), (session,)):
        (tree,) = drafter.propose([ask(one, 3, 0.5, 0.25, 0.125)])
        assert not tree and links.now == pytest.approx(0.875)
        session.comes(0.3, 2)
        began = links.now
        (tree,) = drafter.propose([ask(one, 3, 0.5, 0.25, 0.125)])
        assert len(tree) == 2  # the third level was not worth waiting any longer
        assert links.now - began == pytest.approx(0.3)
        began = links.now
        (tree,) = drafter.propose([ask(one, 2, 0.5, 0.25)])  # all that is wanted is there
        assert len(tree) == 2 and links.now == began


async def test_a_late_one_holds_up_nobody_else():
    async with drafting(4) as (links, drafter, texts, sessions):
        for session in sessions[:3]:
            session.comes(0.01, 2)
        trees = drafter.propose([ask(one, 2, 0.05, 0.025) for one in texts])
        assert [len(tree) for tree in trees] == [2, 2, 2, 0]
        assert links.now == pytest.approx(0.075)  # what its tree alone is worth
        sessions[3].coming = False  # far beyond what is usual, or lost
        began = links.now
        drafter.propose([ask(one, 2, 0.05, 0.025) for one in texts])
        assert links.now == began


async def test_without_a_plan_it_waits_as_long_as_it_takes():
    async with drafting() as (links, drafter, (one,), (session,)):
        session.comes(7.0, 4)
        (tree,) = drafter.propose([ask(one, 4)])
        assert len(tree) == 4 and links.now == pytest.approx(7.0)
        session.tree = TokenTree.empty
        session.coming = True
        links.events.append((9.0, lambda: setattr(session, "coming", False)))
        assert not drafter.propose([ask(one, 4)])[0]
        assert links.now == pytest.approx(9.0)


async def test_trees_are_ordered_as_deep_as_was_asked_for_and_only_if_it_was():
    async with drafting() as (links, drafter, (one,), (session,)):
        assert session.orders == [(2, 4)]  # the draft reads while the target does
        drafter.propose([ask(one, 3, 0.0, 0.0, 0.0)])
        one.tokens += [3, 4]
        drafter.advance(one)
        assert session.orders[1:] == [(4, 3)]
        one.tokens += [5]
        drafter.advance(one)  # a round without drafts
        assert session.orders[2:] == []
        quiet = text()
        drafter.open(quiet)
        assert links.sessions[quiet].orders == []
        session.ordered = 0
        drafter.propose([ask(one, 6, *[0.0] * 6)])  # now they are tried again
        await asyncio.sleep(0)
        assert session.orders[2:] == [(5, 6)]
        again = text()
        drafter.open(again)
        assert links.sessions[again].orders == [(2, 6)]
        drafter.close(one)
        assert session.closed and not drafter.serves(one)
        drafter.advance(one)  # its last piece was on the way


async def test_a_text_without_a_draft_is_not_asked_for():
    async with drafting() as (_, drafter, (one,), (session,)):
        assert drafter.serves(one) and not drafter.serves(text())
        session.open = False
        assert not drafter.serves(one)
        assert drafter.propose([ask(text(), 4, 1.0)]) == [TokenTree.empty]


class Model(Drafter):
    depth = 2

    def propose(self, asks):
        return [TokenTree.chain([1])] * len(asks)


@pytest.mark.parametrize(
    "mode, served", [(None, "lmn"), ("model", "lmn"), ("ngram", "n"), ("none", "")]
)
async def test_modes(mode, served):
    it = Speculator(links=Links(), model=Model())
    one = text()
    it.open(one, mode)
    letters = zip("lmn", it.drafters, strict=True)
    assert "".join(letter for letter, drafter in letters if drafter.serves(one)) == served
    it.advance(one)
    it.close(one)


def test_what_drafts_at_all():
    assert not Speculator().has_model and len(Speculator().drafters) == 1
    assert Speculator(model=Model()).has_model
    assert Speculator(links=Links()).has_model


async def test_nobody_waits_for_a_replica_that_has_gone():
    async with drafting() as (links, drafter, (one,), (session,)):
        session.goes(0.1, alone=True)
        (tree,) = drafter.propose([ask(one, 3)])  # worth any time
        assert not tree and links.now == pytest.approx(0.1)


async def test_another_replica_is_asked_at_once():
    async with drafting() as (_, drafter, (one,), (session,)):
        session.goes(0.1, alone=False)
        before = len(session.orders)
        drafter.propose([ask(one, 3, 0.5)])
        await asyncio.sleep(0)
        assert session.orders[before:]


async def test_drafts_are_ordered_where_there_are_none_until_they_have_been_at_rest():
    async with drafting(2) as (links, drafter, texts, sessions):
        for session in sessions:
            session.open = False
        drafter.advance(texts[0])  # without a tree, as there is nobody
        drafter.open(texts[0])
        assert links.sessions[texts[0]].orders
        links.sessions[texts[0]].open = True
        drafter.advance(texts[0])  # without a tree, as it does not pay
        assert drafter._usual == 0
        for seconds, ordered in ((1.0, False), (REST_S, True)):
            links.now += seconds
            links.opens = False
            drafter.open(texts[1])
            assert bool(links.sessions[texts[1]].orders) == ordered
