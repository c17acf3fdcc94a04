"""Both ends of the link over real sockets, with drafters that are right, late, broken or gone."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import replace

import pytest

from linearized.speculative import Drafter, Sampling, TokenTree
from serve_apps.draft.server import DraftServer
from serve_apps.forward import Forward
from serve_apps.link import drafts, protocol
from serve_apps.link.connection import LinkError, dial
from serve_apps.link.drafts import DraftLink
from serve_apps.link.protocol import Close, Commit, Draft, Error, GoAway, Open

VOCAB = 1000
GREEDY = Sampling()


class Counting(Drafter):
    """Guesses the next two whole numbers."""

    depth = 2
    delay = 0.0

    def propose(self, asks):
        time.sleep(self.delay)
        last = [ask.text.tokens[-1] for ask in asks]
        if 666 in last:
            raise ValueError("no such number")
        return [TokenTree.chain([number + 1, number + 2]) for number in last]


class Slow(Counting):
    delay = 0.15


class Held(Counting):
    """Drafts when it may."""

    def __init__(self, may):
        self.may = may

    def propose(self, asks):
        assert self.may.wait(30)
        return super().propose(asks)


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
    it = DraftLink(find, **options)
    it.start()
    try:
        yield it
    finally:
        await it.close()


def finder(endpoint):
    async def find():
        return endpoint

    return find


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(drafts, "BACKOFF_S", (0.01, 0.1))


async def test_drafts_follow_the_text():
    async with serving() as (_, endpoint), linked(finder(endpoint)) as it:
        assert await it.wait_connected(20)
        session = it.session(GREEDY, 1)
        tokens = [5]
        session.advance(tokens)
        for last in (5, 8, 11):
            tree = await session.tree(2)
            assert tree == TokenTree.chain([last + 1, last + 2])
            tokens += [last + 1, last + 2, last + 3]
            session.advance(tokens)
        session.close()


async def test_many_rounds():
    async with serving() as (_, endpoint), linked(finder(endpoint)) as it:
        await it.wait_connected(20)
        session = it.session(GREEDY, 1)
        tokens = [1]
        for _ in range(200):
            session.advance(tokens)
            assert (await session.tree(5)).tokens == (tokens[-1] + 1, tokens[-1] + 2)
            tokens.append(tokens[-1] % 900 + 1)


async def test_sessions_do_not_mix():
    async with serving() as (server, endpoint), linked(finder(endpoint)) as it:
        await it.wait_connected(20)
        sessions = [it.session(GREEDY, 1) for _ in range(20)]
        for number, session in enumerate(sessions):
            session.advance([10 * number])
        for number, session in enumerate(sessions):
            assert (await session.tree(20)).tokens[0] == 10 * number + 1
        assert server.num_sessions == 20
        for session in sessions:
            session.close()
        await until(lambda: server.num_sessions == 0)


async def test_a_late_draft_is_not_waited_for_and_not_taken():
    may = threading.Event()
    async with serving(lambda: Held(may)) as (_, endpoint), linked(finder(endpoint)) as it:
        await it.wait_connected(20)
        session = it.session(GREEDY, 1)
        session.advance([5])
        assert await session.tree(0.03) is None
        may.set()
        session.advance([5, 7])
        await asyncio.sleep(0.2)  # the draft of [5] is here by now
        assert (await session.tree(5)).tokens == (8, 9)


async def test_no_link_no_waiting():
    async def nobody():
        raise RuntimeError("there is no replica")

    async with linked(nobody) as it:
        session = it.session(GREEDY, 1)
        session.advance([5])
        assert await asyncio.wait_for(session.tree(600), 30) is None
        assert not await it.wait_connected(0.05)


async def test_a_draft_that_dies_wakes_whoever_waits_and_is_replaced():
    endpoints = []

    async def find():
        return endpoints[-1]

    async with contextlib.AsyncExitStack() as first:
        _, endpoint = await first.enter_async_context(serving(Slow))
        endpoints.append(endpoint)
        async with linked(find) as it:
            await it.wait_connected(20)
            session = it.session(GREEDY, 1)
            session.advance([5])
            waiting = asyncio.create_task(session.tree(60))
            await asyncio.sleep(0.05)
            it.connection.drop()
            assert await asyncio.wait_for(waiting, 20) is None
            await it.wait_connected(20)  # the same replica again, and no wiser about this text
            session.advance([5, 6])
            assert (await session.tree(20)).tokens == (7, 8)
            async with serving() as (_, endpoint):
                endpoints.append(endpoint)
                await first.aclose()  # says goodbye
                await until(lambda: it.connected)
                session.advance([5, 6, 7, 8])
                assert (await session.tree(20)).tokens == (9, 10)


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


async def test_another_vocabulary_is_not_used():
    async with serving() as (_, endpoint):
        async with linked(finder(endpoint), vocab_size=VOCAB + 1) as it:
            assert not await it.wait_connected(0.2)
        async with open_connection(endpoint) as connection:
            connection.send(Open(1, 1, (5,), 1, GREEDY, VOCAB + 1))
            assert (await connection.receive()).code == protocol.REFUSED
            connection.send(Open(2, 1, (VOCAB,), 1, GREEDY, VOCAB))
            assert (await connection.receive()).code == protocol.REFUSED


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
            good.send(Open(1, 1, (5,), 1, GREEDY, VOCAB))
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
        it.send(Commit(7, 1, 3, (4,)))
        unknown = await it.receive()
        assert isinstance(unknown, Error) and unknown.code == protocol.UNKNOWN_SESSION
        it.send(Open(7, 1, (1, 2, 3), 1, GREEDY, VOCAB))
        assert await it.receive() == Draft(7, 1, 3, TokenTree.chain([4, 5]))
        it.send(Open(7, 1, (9, 9), 1, GREEDY, VOCAB))  # repeated: ignored
        it.send(Commit(7, 0, 3, (9,)))  # of a former epoch: ignored
        it.send(Commit(7, 1, 1, (2, 3)))  # known already: ignored
        it.send(Commit(7, 1, 2, (3, 10)))  # overlaps: the rest is taken
        assert await it.receive() == Draft(7, 1, 4, TokenTree.chain([11, 12]))
        it.send(Commit(7, 1, 9, (4,)))  # a gap
        assert (await it.receive()).code == protocol.UNKNOWN_SESSION
        it.send(Open(7, 2, (20,), 1, GREEDY, VOCAB))
        assert await it.receive() == Draft(7, 2, 1, TokenTree.chain([21, 22]))
        it.send(Close(7))
        it.send(Close(8))  # there is none: ignored
        it.send(Commit(7, 2, 1, (4,)))
        assert (await it.receive()).code == protocol.UNKNOWN_SESSION


async def test_a_forgotten_session_is_opened_anew():
    async with serving(max_sessions=1) as (server, endpoint), linked(finder(endpoint)) as it:
        await it.wait_connected(20)
        one, two = it.session(GREEDY, 1), it.session(GREEDY, 1)
        one.advance([5])
        assert (await one.tree(2)).tokens == (6, 7)
        two.advance([50])
        assert (await two.tree(2)).tokens == (51, 52)
        assert server.num_sessions == 1
        one.advance([5, 6])
        assert (await one.tree(2)).tokens == (7, 8)


async def test_a_drafter_that_fails_is_left_alone():
    async with serving() as (server, endpoint), linked(finder(endpoint)) as it:
        await it.wait_connected(20)
        session, other = it.session(GREEDY, 1), it.session(GREEDY, 1)
        session.advance([666])
        assert await asyncio.wait_for(session.tree(60), 20) is None
        session.advance([666, 1])
        assert await asyncio.wait_for(session.tree(60), 20) is None
        other.advance([5])
        assert (await other.tree(2)).tokens == (6, 7)
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
