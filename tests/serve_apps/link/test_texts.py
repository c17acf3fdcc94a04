"""Texts between ingress and target: events, cancelling, flow control, and ends of all kinds; over
real sockets, through a Serve handle, and within one process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import aclosing
from dataclasses import replace

import pytest

from linearized.speculative import Alternatives, Sampling
from serve_apps.generation import (
    Delta,
    Description,
    Finished,
    Generation,
    Left,
    Refused,
    Started,
)
from serve_apps.link import discovery, listener, targets, text_link, text_server
from serve_apps.link.connection import LinkError, dial
from serve_apps.link.listener import Listener
from serve_apps.link.protocol import Close
from serve_apps.link.targets import Targets
from serve_apps.link.text_server import TextServer
from serve_apps.link.texts import (
    PART,
    STATE_PART,
    WINDOW,
    Cancel,
    Failed,
    More,
    StatePart,
    Status,
    Submit,
)
from serve_apps.logs import REQUEST


class Words:
    """Says as many words as it may, and remembers how many it has said of each text."""

    def __init__(self, fingerprint="f"):
        self.said: dict[int, int] = {}
        self.ended = 0
        self.ill = False
        self.texts = 0
        self.fingerprint = fingerprint
        self.state = b""
        self.given: list[bytes] = []
        self.lent: list[bytes] = []
        self.asked: list[tuple[int, ...]] = []
        self.requests: list[str | None] = []
        self.left: set[int] = set()

    async def ready(self):
        return Description(
            fingerprint=self.fingerprint,
            vocab_size=100,
            max_context=100,
            draft="none",
            texts=self.texts,
            room=2,
        )

    async def check_health(self):
        if self.ill:
            raise RuntimeError("ill")

    async def lend(self, tokens, owner):
        self.asked.append((owner, *tokens))
        if owner == "broken":
            raise RuntimeError("broken")
        if owner in ("slow", "gone"):
            await asyncio.sleep(60)
        return self.state

    def leave(self, job):
        self.left.add(job.prompt[0])

    async def complete(self, job):
        name = job.prompt[0]
        self.given.append(job.state)
        self.lent.append(job.lent)
        self.requests.append(REQUEST.get())
        try:
            if name == 66:
                raise RuntimeError("broken")
            if name == 67:
                yield Refused(status=503, message="full", code="overloaded", retry_after=2)
                return
            told = None if job.prompt_logprobs is None else Alternatives(-0.5, ((1, -0.5),))
            yield Started(cached_tokens=3, prompt_logprobs=(told,) * (job.prompt_logprobs or 0))
            for i in range(job.max_tokens):
                await asyncio.sleep(0)
                self.said[name] = i + 1
                if name in self.left and self.state:
                    yield Left(state=self.state)
                    return
                yield Delta(text=f"w{i} ", tokens=(i,), logprobs=(Alternatives(-1.0, ()),))
            yield Finished(reason="length", rounds=job.max_tokens, drafted=(4, 2), accepted=(1, 1))
        finally:
            self.ended += 1


def job(name=1, max_tokens=5, **values):
    return Generation(prompt=(name, 2), max_tokens=max_tokens, sampling=Sampling(), **values)


@contextlib.asynccontextmanager
async def served(target, **settings):
    server = TextServer(target, **{"heartbeat_s": 0.1, **settings})
    try:
        yield server
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def linked(*servers):
    async def find():
        return [await server.endpoint() for server in servers]

    them = Targets(find, heartbeat_s=0.1)
    try:
        yield them
    finally:
        await them.close()


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(discovery, "EVERY_S", (0.01, 0.05))
    monkeypatch.setattr(text_server, "STATUS_S", 0.02)


@contextlib.asynccontextmanager
async def over_link(target):
    async with served(target) as server, linked(server) as them:
        yield await them.pick(seconds=20)


@contextlib.asynccontextmanager
async def in_process(target):
    yield target


@contextlib.asynccontextmanager
async def through_handle(target):
    """Serve's handle, in its mode without a cluster."""
    from ray import serve

    from serve_apps.app import Handle

    class Served:
        async def ready(self):
            return await target.ready()

        async def complete(self, job):
            async for event in target.complete(job):
                yield event

    app = serve.deployment(Served).bind()
    handle = serve.run(app, _local_testing_mode=True)
    yield await Handle(handle).pick(seconds=20, fingerprint=None, avoid=())


@pytest.fixture(params=[over_link, in_process, through_handle])
async def transport(request):
    target = Words()
    async with request.param(target) as replica:
        yield target, replica


async def read(replica, wanted):
    return [event async for event in replica.complete(wanted)]


async def test_events_come_as_they_were_said(transport):
    target, replica = transport
    wanted = job(max_tokens=200)
    assert await read(replica, wanted) == [event async for event in Words().complete(wanted)]
    assert target.ended == 1


async def test_many_texts_at_once(transport):
    _, replica = transport
    jobs = [job(name=i, max_tokens=5 + i) for i in range(40)]
    found = await asyncio.gather(*(read(replica, one) for one in jobs))
    assert [len(events) for events in found] == [one.max_tokens + 2 for one in jobs]


async def test_refusals_come_through(transport):
    _, replica = transport
    (refused,) = await read(replica, job(name=67))
    assert (refused.status, refused.retry_after) == (503, 2)


async def test_a_text_that_fails_leaves_the_others_alone(transport):
    _, replica = transport
    other = asyncio.create_task(read(replica, job(max_tokens=50)))
    with pytest.raises((LinkError, RuntimeError), match="broken"):
        await read(replica, job(name=66))
    assert len(await other) == 52


async def test_whoever_leaves_ends_the_text(transport):
    target, replica = transport
    async with aclosing(replica.complete(job(max_tokens=10**6))) as events:
        for _ in range(5):
            await anext(events)
    await until(lambda: target.ended == 1)


async def test_log_probabilities_of_a_long_prompt_come_in_one_event(transport):
    _, replica = transport
    events = await read(replica, job(prompt_logprobs=3 * PART + 1))
    assert len(events[0].prompt_logprobs) == 3 * PART + 1 and events[0].cached_tokens == 3


async def test_a_text_that_nobody_reads_waits_and_holds_up_nobody():
    target = Words()
    async with over_link(target) as replica, aclosing(replica.complete(job(1, 10**6))) as slow:
        await anext(slow)
        await until(lambda: target.said.get(1, 0) >= WINDOW - 1)
        for i in range(5):
            assert len(await read(replica, job(2 + i, 300))) == 302
        assert target.said[1] <= WINDOW + 1
        for _ in range(3 * WINDOW):
            await anext(slow)
        assert 3 * WINDOW <= target.said[1] <= 4 * WINDOW + 2


async def test_a_peer_that_is_gone_leaves_nothing_behind():
    target = Words()
    async with served(target) as server:
        connection = await dial(await server.endpoint(), heartbeat_s=0.1)
        for number in range(8):
            connection.send(Submit(number, job(number, 10**6)))
        await until(lambda: server.num_texts == 8)
        connection.drop()
        await until(lambda: server.num_texts == 0)
        assert target.ended == 8
        await until(lambda: not server._listener.connections)


async def test_a_connection_that_breaks_ends_its_texts_with_an_error_and_comes_back():
    target = Words()
    async with served(target) as server, linked(server) as them:
        replica = await them.pick(seconds=20)
        events = replica.complete(job(1, 10**6))
        await anext(events)
        for connection in server._listener.connections:
            connection.drop()
        with pytest.raises(LinkError):
            async for _ in events:
                pass
        again = await them.pick(seconds=20)
        assert again is not replica and len(await read(again, job())) == 7


async def test_a_target_that_hangs_is_noticed():
    async def mute(connection):
        await asyncio.sleep(60)

    it = Listener(mute, heartbeat_s=60)
    endpoint = await it.start(fingerprint="f", vocab_size=1)
    connection = await dial(endpoint, heartbeat_s=0.05)
    with pytest.raises(LinkError):
        await asyncio.wait_for(connection.receive(), 20)
    await connection.abort()
    await it.close()


async def test_a_pause_of_ones_own_is_no_silence_of_the_peers():
    async with over_link(Words()) as replica:
        before = replica._connection
        for _ in range(3):
            time.sleep(0.5)  # five heartbeats, and nobody runs
            await asyncio.sleep(0.05)
        assert len(await read(replica, job())) == 7 and replica._connection is before


async def test_a_target_that_drains_keeps_what_it_has_and_takes_no_more():
    target = Words()
    async with served(target) as server, linked(server) as them:
        replica = await them.pick(seconds=20)
        events = replica.complete(job(1, 100))
        await anext(events)
        draining = asyncio.create_task(server.drain(20))
        await until(lambda: replica.leaving)
        assert await them.pick(seconds=0.05) is None
        with pytest.raises(LinkError, match="about to end"):
            await read(replica, job(2))
        assert not draining.done()
        assert len([event async for event in events]) == 101
        await draining


async def test_an_ill_target_says_goodbye():
    target = Words()
    async with over_link(target) as replica:
        target.ill = True
        await until(lambda: replica.leaving)


async def test_the_less_loaded_of_two_is_picked():
    one, two = Words(), Words()
    one.texts = 5
    async with served(one) as first, served(two) as second, linked(first, second) as them:
        await them.pick(seconds=20)
        await until(lambda: sum(link.usable for link in them.links) == 2)
        picked = {await them.pick(seconds=1) for _ in range(20)}
        assert [link.description.texts for link in picked] == [0]
        (idle,) = picked
        assert them.others(idle, ()) and (await them.pick(seconds=1, avoid=picked)) not in picked
        one.texts, two.texts = 0, 9
        await until(lambda: {link.description.texts for link in them.links} == {0, 9})
        assert await them.pick(seconds=1) not in picked


async def test_only_replicas_of_the_same_model_are_picked():
    async with served(Words("old")) as first, linked(first) as them:
        assert (await them.ready()).fingerprint == "old"
        assert await them.pick(seconds=0.05, fingerprint="new") is None


@pytest.mark.parametrize("sent", [Close(1), More(1, 1), Cancel(1), Failed(1, ""), "twice"])
async def test_what_does_not_belong_ends_the_connection_and_no_other(sent):
    target = Words()
    async with served(target) as server:
        endpoint = await server.endpoint()
        good, bad = [await dial(endpoint, heartbeat_s=0.1) for _ in range(2)]
        assert isinstance(await bad.receive(), Status)
        for message in [Submit(1, job(1, 10**6))] * 2 if sent == "twice" else [sent]:
            bad.send(message)
        if not isinstance(sent, More | Cancel):  # of a text that has ended: nothing to be done
            with pytest.raises(LinkError):
                while True:
                    await asyncio.wait_for(bad.receive(), 20)
        assert isinstance(await good.receive(), Status)
        good.send(Submit(1, job()))
        assert (await asyncio.wait_for(good.receive(), 20)).event.cached_tokens == 3
        for connection in (good, bad):
            await connection.abort()
        await until(lambda: server.num_texts == 0)


async def test_strangers_are_bounded_and_do_not_keep_peers_out(monkeypatch):
    monkeypatch.setattr(listener, "MAX_STRANGERS", 4)
    async with served(Words()) as server:
        endpoint = await server.endpoint()
        strangers = [await asyncio.open_connection(endpoint.host, endpoint.port) for _ in range(12)]
        await until(lambda: len(server._listener._strangers) <= 4)
        peer = await dial(endpoint, heartbeat_s=0.1)
        assert isinstance(await peer.receive(), Status)
        await peer.abort()
        for _, writer in strangers:
            writer.transport.abort()


async def test_ports_are_taken_from_the_range():
    async with served(Words()) as any_port:
        taken = (await any_port.endpoint()).port
        async with served(Words(), ports=(taken, taken)) as server:
            with pytest.raises(ValueError, match=f"no port between {taken} and {taken} is free"):
                await server.endpoint()
        async with served(Words(), ports=(20000, 29999)) as server:
            assert 20000 <= (await server.endpoint()).port <= 29999


async def test_on_one_machine_a_unix_socket_is_used_and_elsewhere_the_port():
    async with served(Words()) as server:
        endpoint = await server.endpoint()
        for place in (endpoint, replace(endpoint, path="\0nowhere"), replace(endpoint, path="")):
            connection = await dial(place, heartbeat_s=0.1)
            assert isinstance(await connection.receive(), Status)
            await connection.abort()
        assert endpoint.path.startswith("\0")


async def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def leave_after(link, wanted, events):
    """What is said of a text that is asked to leave after so many events."""
    found = []
    async with aclosing(link.complete(wanted)) as stream:
        async for event in stream:
            found.append(event)
            if len(found) >= events:
                link.leave(wanted)
    return found


async def test_states_are_handed_over_in_both_directions():
    target = Words()
    target.state = bytes(range(256)) * (STATE_PART * 3 // 256) + b"the end"
    async with over_link(target) as link:
        wanted = [job(name, 10**6) for name in range(5)]
        found = await asyncio.gather(*(leave_after(link, one, 4) for one in wanted))
        assert [events[-1] for events in found] == [Left(state=target.state)] * 5
        told = [replace(one, max_tokens=3, state=target.state) for one in wanted]
        target.left.clear()
        target.given.clear()
        found = await asyncio.gather(*(read(link, one) for one in told))
        assert [type(events[-1]) for events in found] == [Finished] * 5
        assert target.given == [target.state] * 5


async def test_a_target_that_hands_nothing_over_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(text_link, "LEAVE_S", 0.05)
    target = Words()
    async with over_link(target) as link:
        with pytest.raises(LinkError, match="does not hand the text over"):
            await leave_after(link, job(1, 10**7), 3)
        link.leave(job(2))  # no such text
        assert len(await read(link, job(2))) == 7


async def test_no_more_of_a_state_is_kept_than_is_allowed(monkeypatch):
    monkeypatch.setattr(text_server, "MAX_STATE", 100)
    target = Words()
    async with served(target) as server:
        connection = await dial(await server.endpoint(), heartbeat_s=0.1)
        assert isinstance(await connection.receive(), Status)
        for number in range(5):  # of texts that are given up
            connection.send(StatePart(number, b"x" * 90))
            connection.send(Cancel(number))
        connection.send(StatePart(7, b"x" * 60))
        connection.send(Submit(7, job(7)))
        assert (await connection.receive()).text == 7 and target.given == [b"x" * 60]
        for number in range(2):
            connection.send(StatePart(number, b"x" * 60))
        with pytest.raises(LinkError):
            while True:
                await connection.receive()
        await connection.close()


async def test_a_state_that_is_too_large_is_not_handed_over(monkeypatch):
    monkeypatch.setattr(text_server, "MAX_STATE", 100)
    target = Words()
    target.state = b"x" * 101
    async with over_link(target) as link:
        assert (await leave_after(link, job(1, 10**6), 3))[-1] == Left()


async def test_a_state_that_nobody_has_asked_for_ends_the_connection():
    async def serve(connection):
        connection.send(Status(await Words().ready()))
        submit = await connection.receive()
        connection.send(StatePart(submit.text, b"x"))
        await connection.receive()

    place = Listener(serve, heartbeat_s=0.1)
    endpoint = await place.start(fingerprint="f", vocab_size=100)

    async def find():
        return [endpoint]

    them = Targets(find, heartbeat_s=0.1)
    link = await them.pick(seconds=20)
    with pytest.raises(LinkError, match="nobody has asked for"):
        await read(link, job(1))
    await them.close()
    await place.close()


async def test_a_text_is_logged_under_its_request_and_no_other():
    target = Words()
    async with over_link(target) as link:
        await read(link, job(request="req-7"))
        await read(link, job())
        assert target.requests == ["req-7", None] and REQUEST.get() is None


async def test_prefixes_are_lent_side_by_side():
    target = Words()
    target.state = bytes(range(256)) * (STATE_PART * 3 // 256) + b"the end"
    async with over_link(target) as link:
        found = await asyncio.gather(*(link.lend((name, 2), "a") for name in range(4)))
        assert found == [target.state] * 4
        assert sorted(target.asked) == [("a", name, 2) for name in range(4)]
        assert len(await read(link, job(lent=target.state))) == 7
        assert target.lent == [target.state] and target.given == [b""]
        target.state = b""
        assert await link.lend((1,), "a") == b""


@pytest.mark.parametrize("why", ["broken", "slow", "large", "many", "gone"])
async def test_a_prefix_that_does_not_come_is_not_waited_for(monkeypatch, why):
    monkeypatch.setattr(text_link, "LEND_S", 30 if why == "gone" else 0.2)
    target = Words()
    target.state = b"x" * 100
    if why == "large":
        monkeypatch.setattr(text_server, "MAX_STATE", 99)
    if why == "many":
        monkeypatch.setattr(text_server, "MAX_LENDING", 0)
    async with served(target) as server, linked(server) as them:
        link = await them.pick(seconds=20)
        asked = asyncio.create_task(link.lend((1, 2), why))
        if why == "gone":
            await asyncio.sleep(0)
            await server.close()
        assert await asked == b"" and not link._lending
        if why != "gone":
            assert len(await read(link, job())) == 7
        else:
            assert await link.lend((1, 2), "a") == b""


async def test_a_text_goes_where_its_beginning_was_read_unless_that_is_crowded(monkeypatch):
    monkeypatch.setattr(targets, "WORTH_IT", 5)
    one, two = Words(), Words()
    beginning = tuple(range(1, 30))
    wanted = replace(job(), prompt=(*beginning, 50))
    async with served(one) as first, served(two) as second, linked(first, second) as them:
        await them.pick(seconds=20)
        await until(lambda: sum(link.usable for link in them.links) == 2)
        reader = await them.pick(seconds=1)
        await read(reader, replace(wanted, prompt=beginning))
        (other,) = [link for link in them.links if link is not reader]
        for _ in range(20):
            assert await them.pick(seconds=1, job=wanted) is reader
        picked = {await them.pick(seconds=1, job=replace(wanted, owner="b")) for _ in range(20)}
        assert picked == {reader, other}
        busy = one if (await reader.lend((), "")) == b"" and one.asked else two
        busy.texts = 9
        await until(lambda: reader.description.texts == 9)
        assert await them.pick(seconds=1, job=wanted) is other
        busy.state = b"prefix"
        assert (await them.lend(wanted, other)).lent == b"prefix"
        assert busy.asked[-1] == ("", *beginning)
        assert not (await them.lend(wanted, reader)).lent
        assert not (await them.lend(replace(wanted, owner="b"), other)).lent
        monkeypatch.setattr(targets, "WORTH_IT", len(beginning) + 1)
        assert not (await them.lend(wanted, other)).lent
