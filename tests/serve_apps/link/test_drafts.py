"""Both ends of the link over real sockets, with drafters that are right, late, broken or gone."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import replace

import pytest

from linearized.speculative import Drafter, Sampling, Text, TokenTree
from linearized.speculative.record import Record
from serve_apps.draft.server import DraftServer, Load
from serve_apps.draft.session import Session
from serve_apps.forward import Forward
from serve_apps.link import breaker, discovery, draft_peer, draft_session, protocol
from serve_apps.link.connection import LinkError, dial
from serve_apps.link.drafts import DraftLinks
from serve_apps.link.protocol import Close, Commit, Draft, Error, GoAway, Open

VOCAB = 1000
GREEDY = Sampling()


class Counting(Drafter):
    """Guesses the next whole numbers, as many as it is asked for."""

    depth = 2

    def propose(self, asks):
        last = [ask.text.tokens[-1] for ask in asks]
        if 666 in last:
            raise ValueError("no such number")
        return [chain(number, ask.depth) for number, ask in zip(last, asks, strict=True)]


class Held(Counting):
    """Drafts when it may."""

    def __init__(self, may):
        self.may = may

    def propose(self, asks):
        assert self.may.wait(30)
        return super().propose(asks)


class Ahead(Counting):
    """Looks ahead step by step, as often as it may."""

    def __init__(self, may, looks):
        self.may, self.looks = may, looks

    def foresee(self, foresights, depths, *, wide=False):
        assert self.may.acquire(timeout=30)
        for one, depth in zip(foresights, depths, strict=True):
            self.looks.append((tuple(one.text.tokens), one.path(*one.frontier(depth, 1))))
            (front,) = one.frontier(depth, 1)
            last = one.tokens[front] if front >= 0 else one.text.tokens[-1]
            one.add([front], [([1.0], [last + 1])])


def chain(last, depth):
    tokens = range(last + 1, last + 1 + depth)
    return TokenTree.chain(tokens, [1.0] * depth)


@contextlib.asynccontextmanager
async def serving(make=Counting, **settings):
    forward = Forward()
    options = {"fingerprint": "f", "vocab_size": VOCAB, "heartbeat_s": 0.1, **settings}
    server = DraftServer(make, forward=forward, **options)
    endpoint = await server.start()
    try:
        yield server, endpoint
    finally:
        await server.close()
        forward.close()


@contextlib.asynccontextmanager
async def linked(find, **settings):
    options = {"vocab_size": VOCAB, "heartbeat_s": 0.1, **settings}
    it = DraftLinks(find, **options)
    it.start()
    try:
        yield it
    finally:
        await it.close()


def finder(*endpoints):
    async def find():
        return endpoints

    return find


def peer_at(links, endpoint):
    return next(peer for peer in links._peers if peer.endpoint == endpoint)


def text(*tokens):
    return Text(tokens, sampling=GREEDY, max_new_tokens=1000, num_prompt=1)


async def answer(session, depth=2):
    """What the draft makes of the text as it is, that deep at least; None if nothing will come."""
    async with asyncio.timeout(20):
        while max(session.tree.depths, default=0) < depth:
            if not session.awaited(time.monotonic()):
                return None
            await asyncio.sleep(0.001)
    return session.tree


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(discovery, "EVERY_S", (0.01, 0.1))
    monkeypatch.setattr(draft_peer, "RECONNECT_S", 0.01)
    monkeypatch.setattr(breaker, "PAUSE_S", (0.02, 0.1))
    monkeypatch.setattr(draft_session, "LATE_S", 30.0)
    monkeypatch.setattr(draft_peer, "MARGIN_S", 30.0)


async def test_drafts_follow_the_text():
    async with serving() as (_, endpoint), linked(finder(endpoint)) as it:
        assert await it.wait_connected(20)
        mine = text(5)
        session = it.session(mine)
        for last in (5, 8, 11):
            session.order(2)
            assert session.ordered == 2
            assert await answer(session) == chain(last, 2)
            mine.tokens += [last + 1, last + 2, last + 3]
            assert session.ordered == 0
        session.close()


async def test_many_rounds():
    async with serving() as (_, endpoint), linked(finder(endpoint)) as it:
        await it.wait_connected(20)
        mine = text(1)
        session = it.session(mine)
        for _ in range(200):
            session.order(2)
            assert await answer(session) == chain(mine.tokens[-1], 2)
            mine.tokens.append(mine.tokens[-1] % 900 + 1)


async def test_trees_are_as_deep_as_was_asked_for():
    async with serving(max_depth=5) as (_, endpoint), linked(finder(endpoint)) as it:
        await it.wait_connected(20)
        mine = text(1)
        session = it.session(mine)
        for depth, deep in ((1, 1), (4, 4), (9, 5)):
            session.order(depth)
            assert await answer(session, deep) == chain(mine.tokens[-1], deep)
            mine.tokens.append(50)
            await asyncio.sleep(0.01)


async def test_sessions_do_not_mix():
    async with serving() as (server, endpoint), linked(finder(endpoint)) as it:
        await it.wait_connected(20)
        sessions = [it.session(text(10 * number)) for number in range(20)]
        for session in sessions:
            session.order(2)
        for number, session in enumerate(sessions):
            assert (await answer(session)).tokens[0] == 10 * number + 1
        assert server.num_sessions == it.num_sessions == 20
        for session in sessions:
            session.close()
        await until(lambda: server.num_sessions == 0)
        assert it.num_sessions == 0


async def test_nothing_is_sent_for_a_text_that_nobody_asks_for():
    async with serving() as (server, endpoint), linked(finder(endpoint)) as it:
        await it.wait_connected(20)
        mine = text(5)
        session = it.session(mine)
        assert session.open and not session.ordered
        assert not session.awaited(time.monotonic())
        await asyncio.sleep(0.05)
        assert server.num_sessions == 0
        session.order(2)
        mine.tokens += [9] * 50  # without a word
        session.order(2)
        assert await answer(session) == chain(9, 2)


async def test_a_late_tree_is_of_use_as_far_as_the_text_went_its_way():
    may = threading.Event()
    async with serving(lambda: Held(may)) as (_, endpoint), linked(finder(endpoint)) as it:
        await it.wait_connected(20)
        right, wrong = text(5), text(50)
        sessions = [it.session(one) for one in (right, wrong)]
        for session in sessions:
            session.order(2)
            assert session.awaited(time.monotonic()) and not session.tree
        right.tokens.append(6)
        wrong.tokens.append(77)
        assert not any(session.awaited(time.monotonic()) for session in sessions)
        may.set()
        await until(lambda: all(session._found[0] for session in sessions))
        assert sessions[0].tree == chain(6, 1)
        assert not sessions[1].tree


async def test_drafting_goes_on_while_the_target_verifies():
    """One look a level. The answer goes out after two; those after it are taken while the target
    is busy, and what it then takes up needs no look any more."""
    may, looks = threading.Semaphore(0), []
    make = lambda: Ahead(may, looks)  # noqa: E731
    async with serving(make) as (_, endpoint), linked(finder(endpoint)) as it:
        await it.wait_connected(20)
        mine = text(5)
        session = it.session(mine)
        session.order(2)
        may.release(2)
        assert await answer(session) == chain(5, 2)
        may.release(3)
        await until(lambda: session.tree == chain(5, 5))  # it was sent without being asked for
        assert looks[-1] == ((5,), (6, 7, 8, 9))
        mine.tokens += [6, 7, 8]
        assert session.tree == chain(8, 2)  # before the draft knows
        session.order(2)
        await until(lambda: not session._owed)  # answered without a look
        assert len(looks) == 5
        may.release(3)
        await until(lambda: session.tree == chain(8, 5))
        assert looks[-1] == ((5, 6, 7, 8), (9, 10, 11, 12))
        mine.tokens += [9, 99]  # not as foreseen
        session.order(2)
        may.release(2)
        assert (await answer(session)).tokens == (100, 101)
        assert looks[-2:] == [((5, 6, 7, 8, 9, 99), ()), ((5, 6, 7, 8, 9, 99), (100,))]
        may.release(100)


def test_targets_who_talk_all_the_time_do_not_keep_a_draft_from_drafting():
    forward = Forward()
    server = DraftServer(Counting, forward=forward, fingerprint="f", vocab_size=VOCAB)
    mine = Session(Open(1, 1, (5,), 1, GREEDY, 2), most=9, deepest=9, record=Record())
    server._heard = True
    server._look([mine], [])
    assert mine.due and mine.foresight.tree() == chain(5, 2)
    forward.close()


async def test_no_link_no_waiting():
    async def nobody():
        raise RuntimeError("there is no replica")

    for find in (nobody, finder()):
        async with linked(find) as it:
            session = it.session(text(5))
            assert not session.open
            session.order(2)
            assert not session.awaited(time.monotonic()) and not session.tree
            assert not await it.wait_connected(0.05)


class Asleep:
    """A replica that runs once somebody has asked for it."""

    def __init__(self, endpoint):
        self.endpoint, self.found, self.asked, self.waiting = endpoint, [], 0, 0
        self.starts = asyncio.Event()

    async def find(self):
        return self.found

    async def wake(self):
        self.asked += 1
        self.waiting += 1
        try:
            await self.starts.wait()
            self.found = [self.endpoint]
        finally:
            self.waiting -= 1


async def test_a_draft_is_woken_for_a_text_and_for_nothing_else():
    async with serving() as (_, endpoint):
        asleep = Asleep(endpoint)
        async with linked(asleep.find, wake=asleep.wake) as it:
            assert not await it.wait_connected(0.1)
            assert asleep.asked == 0
            one, two = it.session(text(5)), it.session(text(6))
            await asyncio.sleep(0.1)
            assert asleep.asked == 0  # nothing is ordered
            for session in (one, two):
                session.order(2)
            await until(lambda: asleep.waiting == 1)
            one.close()
            await asyncio.sleep(0.1)
            assert (asleep.asked, asleep.waiting) == (1, 1)
            two.close()
            await until(lambda: asleep.waiting == 0)  # nobody wants it any more
            session = it.session(text(7))
            session.order(2)
            await until(lambda: asleep.waiting == 1)
            asleep.starts.set()
            assert await it.wait_connected(20)
            session.order(2)
            assert await answer(session) == chain(7, 2)
            assert (asleep.asked, asleep.waiting) == (2, 0)
            it.session(text(8)).order(2)
        async with linked(Asleep(endpoint).find) as it:  # nobody can be woken
            it.session(text(5)).order(2)
            assert not await it.wait_connected(0.05)


async def test_a_draft_that_cannot_be_woken_is_tried_again(caplog):
    tries = []

    async def wake():
        tries.append(1)
        raise RuntimeError("no room")

    async with linked(finder(), wake=wake) as it:
        it.session(text(5)).order(2)
        await until(lambda: len(tries) > 2)
    assert "no draft replica could be started: no room" in caplog.text


async def test_a_draft_knows_its_load():
    may = threading.Event()
    may.set()
    async with serving(lambda: Held(may)) as (server, endpoint), linked(finder(endpoint)) as it:
        await it.wait_connected(20)
        one, two = text(5), text(50)
        sessions = [it.session(one), it.session(two)]
        for _ in range(3):
            for mine, session in zip((one, two), sessions, strict=True):
                session.order(2)
                await answer(session)
                mine.tokens.append(9)
        load = server.load()
        assert (load.sessions, load.asked, load.late) == (2, 6, 0) and load.seconds > 0
        assert server.load() == Load(0, 0, 0, 0.0)
        may.clear()
        sessions[0].order(2)
        await until(lambda: server.load().asked)
        one.tokens.append(10)
        sessions[0].order(2)  # without its answer
        loads = []
        await until(lambda: loads.append(server.load()) or loads[-1].asked)
        assert (loads[-1].sessions, loads[-1].asked, loads[-1].late) == (1, 1, 1)
        may.set()


async def test_a_draft_that_dies_is_not_waited_for_and_is_replaced():
    endpoints, may = [], threading.Event()

    async def find():
        return endpoints

    async with contextlib.AsyncExitStack() as first:
        _, endpoint = await first.enter_async_context(serving(lambda: Held(may)))
        endpoints.append(endpoint)
        async with linked(find) as it:
            await it.wait_connected(20)
            mine = text(5)
            session = it.session(mine)
            session.order(2)
            assert session.awaited(time.monotonic())
            may.set()
            session.peer._connection.drop()
            await until(lambda: session.peer is None)
            assert not session.awaited(time.monotonic())
            await until(lambda: session.open)  # the same replica again, no wiser about this text
            mine.tokens.append(6)
            session.order(2)
            assert await answer(session) == chain(6, 2)
            async with serving() as (_, endpoint):
                endpoints[:] = [endpoint]
                await first.aclose()  # says goodbye
                await until(lambda: session.peer is None and it.usable)
                mine.tokens += [7, 8]
                session.order(2)
                assert await answer(session) == chain(8, 2)


async def test_sessions_are_spread_and_move_with_one_open():
    opened = []

    class Watched(DraftServer):
        def _open(self, connection, message):
            opened.append((self, message.tokens))
            super()._open(connection, message)

    async with contextlib.AsyncExitStack() as stack:
        servers, endpoints = [], []
        for _ in range(3):
            forward = Forward()
            server = Watched(
                Counting, forward=forward, fingerprint="f", vocab_size=VOCAB, heartbeat_s=0.1
            )
            stack.callback(forward.close)
            stack.push_async_callback(server.close)
            servers.append(server)
            endpoints.append(await server.start())
        it = await stack.enter_async_context(linked(finder(*endpoints)))
        await until(lambda: sum(peer.connected for peer in it._peers) == 3)
        texts = [text(10 * number) for number in range(12)]
        sessions = [it.session(one) for one in texts]
        for session in sessions:
            session.order(2)
            await answer(session)
        assert all(2 <= server.num_sessions <= 6 for server in servers)
        opened.clear()
        lost, kept = servers[0].num_sessions, [session.peer for session in sessions]
        gone = peer_at(it, endpoints[0])
        await servers[0].close()
        await until(lambda: not gone.connected)
        for one, session in zip(texts, sessions, strict=True):
            one.tokens.append(one.tokens[-1] + 1)
            session.order(2)
            assert await answer(session) == chain(one.tokens[-1], 2)
        assert len(opened) == lost and servers[0] not in [server for server, _ in opened]
        for before, session in zip(kept, sessions, strict=True):
            assert session.peer is before or before is gone


async def test_a_replica_that_does_not_answer_is_left_alone_and_tried_again(monkeypatch):
    monkeypatch.setattr(draft_session, "LATE_S", -1.0)  # everything is late …
    monkeypatch.setattr(draft_peer, "LATE_S", 30.0)
    monkeypatch.setattr(draft_session, "MUCH", -1)
    monkeypatch.setattr(draft_session, "READING_S", -1.0)  # … also if much has to be read
    monkeypatch.setattr(breaker, "PAUSE_S", (600.0, 600.0))
    may = threading.Event()
    async with (
        serving(lambda: Held(may)) as (_, stuck),
        serving() as (_, good),
        linked(finder(stuck)) as it,
    ):
        await it.wait_connected(20)
        mine = text(5)
        session = it.session(mine)
        for token in range(breaker.FAILURES):
            assert session.open
            session.order(2)
            mine.tokens.append(token)
        session.order(2)
        assert it.connected and not it.usable and not session.open
        it._find = finder(stuck, good)
        await until(lambda: it.usable)
        session.order(2)
        assert session.peer.endpoint == good
        await until(lambda: session.tree == chain(2, 2))
        monkeypatch.setattr(breaker, "PAUSE_S", (0.02, 0.1))
        peer_at(it, stuck).breaker._until = 0.0  # the pause is over
        peer_at(it, good).breaker.failed(at_once=True)
        may.set()
        mine.tokens.append(8)
        session.order(2)
        assert session.peer.endpoint == stuck
        await until(lambda: session.tree == chain(8, 2))


async def test_a_silent_peer_is_dropped():
    async def mute(reader, writer):
        await reader.read()  # whatever it hears, it says nothing
        writer.close()

    async with serving() as (_, endpoint):
        connection = await dial(endpoint, heartbeat_s=10)  # never beats in this test
        with pytest.raises(LinkError):
            await asyncio.wait_for(connection.receive(), 20)
        await connection.abort()
        server = await asyncio.start_server(mute, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(LinkError), pytest.MonkeyPatch.context() as patch:
            patch.setattr("serve_apps.link.connection.HANDSHAKE_S", 0.1)
            await dial(replace(endpoint, port=port, path=""))
        server.close()
        await asyncio.sleep(0.05)


async def test_a_wrong_secret_is_refused_on_both_sides():
    async with serving() as (_, endpoint):
        with pytest.raises(LinkError):
            await dial(replace(endpoint, secret=b"guessed"))
        async with linked(finder(replace(endpoint, secret=b"guessed"))) as it:
            assert not await it.wait_connected(0.2)
        await (await dial(endpoint)).abort()  # it still serves those who know


@pytest.mark.parametrize(
    "vocab_size, theirs, ours, used",
    [
        (VOCAB, "", "", True),
        (VOCAB + 1, "", "", False),
        (VOCAB + 1, "t", "", False),
        (VOCAB + 1, "t", "t", True),  # padded
        (VOCAB, "t", "other", False),
        (VOCAB, "", "t", True),
    ],
)
async def test_another_tokenizer_is_not_used(vocab_size, theirs, ours, used):
    async with serving(tokenizer=theirs) as (_, endpoint):
        settings = {"vocab_size": vocab_size, "tokenizer": ours}
        async with linked(finder(endpoint), **settings) as it:
            assert await it.wait_connected(20.0 if used else 0.1) == used


async def test_a_token_that_a_draft_does_not_have_ends_its_session_and_no_other():
    """A target's vocabulary may be padded beyond it."""
    async with serving() as (server, endpoint), open_connection(endpoint) as it:
        it.send(Open(1, 1, (VOCAB,), 1, GREEDY, 2))
        assert (await it.receive()).code == protocol.REFUSED
        for session in (2, 3):
            it.send(Open(session, 1, (5,), 1, GREEDY, 2))
            assert (await it.receive()).tree == chain(5, 2)
        it.send(Commit(2, 1, 1, (6, VOCAB), 2))
        assert (await it.receive()).code == protocol.REFUSED
        it.send(Commit(3, 1, 1, (8,), 2))
        assert await it.receive() == Draft(3, 1, 2, chain(8, 2))
        assert server.num_sessions == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff\xff\xff",  # a frame of 4 GiB
        b"\x00\x00\x00\x01\xc1",  # not msgpack
        protocol.encode(GoAway()),  # not for a target to say
        protocol.encode(protocol.Challenge(1, b"again")),
    ],
)
async def test_nonsense_ends_the_connection_and_nothing_else(sent):
    async with serving() as (server, endpoint):
        async with open_connection(endpoint) as good:
            async with open_connection(endpoint) as bad:
                bad._writer.write(sent)
                with pytest.raises(LinkError):
                    await bad.receive()
            good.send(Open(1, 1, (5,), 1, GREEDY, 2))
            assert (await good.receive()).tree.tokens == (6, 7)
        assert server.running


async def test_a_stranger_may_not_send_much():
    async with serving() as (_, endpoint):
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
        writer.write((100_000).to_bytes(4, "big"))
        await reader.readexactly(4)  # the challenge's header
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 20)  # and then the end
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_repeated_stale_and_unplaceable_commits():
    async with serving() as (_, endpoint), open_connection(endpoint) as it:
        it.send(Commit(7, 1, 3, (4,), 2))
        unknown = await it.receive()
        assert isinstance(unknown, Error) and unknown.code == protocol.UNKNOWN_SESSION
        it.send(Open(7, 1, (1, 2, 3), 1, GREEDY, 2))
        assert await it.receive() == Draft(7, 1, 3, chain(3, 2))
        it.send(Open(7, 1, (9, 9), 1, GREEDY, 2))  # repeated: ignored
        it.send(Commit(7, 0, 3, (9,), 2))  # of a former epoch: ignored
        it.send(Commit(7, 1, 1, (2, 3), 2))  # known already: ignored
        it.send(Commit(7, 1, 2, (3, 10), 2))  # overlaps: the rest is taken
        assert await it.receive() == Draft(7, 1, 4, chain(10, 2))
        it.send(Commit(7, 1, 9, (4,), 2))  # a gap
        assert (await it.receive()).code == protocol.UNKNOWN_SESSION
        it.send(Open(7, 2, (20,), 1, GREEDY, 2))
        assert await it.receive() == Draft(7, 2, 1, chain(20, 2))
        it.send(Close(7))
        it.send(Close(8))  # there is none: ignored
        it.send(Commit(7, 2, 1, (4,), 2))
        assert (await it.receive()).code == protocol.UNKNOWN_SESSION


async def test_a_forgotten_session_is_opened_anew():
    async with serving(max_sessions=1) as (server, endpoint), linked(finder(endpoint)) as it:
        await it.wait_connected(20)
        first, second = text(5), text(50)
        one, two = it.session(first), it.session(second)
        one.order(2)
        assert await answer(one) == chain(5, 2)
        two.order(2)
        assert await answer(two) == chain(50, 2)
        assert server.num_sessions == 1
        first.tokens.append(60)
        one.order(2)
        assert await answer(one) == chain(60, 2)


async def test_a_drafter_that_fails_is_left_alone():
    async with serving() as (server, endpoint), linked(finder(endpoint)) as it:
        await it.wait_connected(20)
        mine = text(666)
        session, other = it.session(mine), it.session(text(5))
        session.order(2)
        assert await answer(session) is None
        mine.tokens.append(1)
        assert not session.open
        session.order(2)
        assert await answer(session) is None
        other.order(2)
        assert await answer(other) == chain(5, 2)
        assert server.running


@contextlib.asynccontextmanager
async def open_connection(endpoint):
    connection = await dial(endpoint, heartbeat_s=0.1)
    try:
        yield connection
    finally:
        await connection.close()


async def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
