"""Replicas that come and go, and peers that follow them."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import pytest

from serve_apps.link import discovery
from serve_apps.link.connection import LinkError
from serve_apps.link.discovery import Peers
from serve_apps.link.protocol import Endpoint


class Friend:
    def __init__(self, endpoint):
        if endpoint.vocab_size == 66:
            raise LinkError("of no use")
        self.endpoint = endpoint
        self.connected, self.gone, self.closed = True, False, False

    async def close(self):
        self.closed = True


class Named:
    """Replicas by their ports, and how often somebody asked for them."""

    def __init__(self, *ports):
        self.ports, self.asked, self.fails = list(ports), 0, False

    async def find(self):
        self.asked += 1
        if self.fails:
            raise RuntimeError("nobody knows")
        return [self.endpoint(port) for port in self.ports]

    def endpoint(self, port):
        return Endpoint(host="h", port=port, secret=b"s", fingerprint="f", vocab_size=port)


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(discovery, "EVERY_S", (0.001, 0.02))


@contextlib.asynccontextmanager
async def following(named):
    them = Peers(named.find, Friend, kind="friendly")
    them.start()
    try:
        yield them
    finally:
        await them.close()


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def ports(them):
    return {peer.endpoint.port for peer in them}


async def test_all_are_found_at_once_and_followed():
    named = Named(1, 2, 3)
    async with following(named) as them:
        await until(lambda: them.connected)
        assert ports(them) == {1, 2, 3} and named.asked == 1
        first = {peer.endpoint.port: peer for peer in them}
        named.ports = [2, 3, 4]
        await until(lambda: ports(them) == {1, 2, 3, 4})  # 1 is still connected: it may say goodbye
        assert not first[1].closed
        first[1].connected = False
        await until(lambda: ports(them) == {2, 3, 4})
        assert first[1].closed and not first[2].closed
    assert all(peer.closed for peer in first.values())


async def test_one_that_is_gone_is_met_anew_if_it_is_named():
    named = Named(1)
    async with following(named) as them:
        await until(lambda: them.connected)
        (friend,) = them
        friend.gone, friend.connected = True, False
        them.turned()
        await until(lambda: [peer for peer in them if peer is not friend])
        assert friend.closed and ports(them) == {1}


async def test_what_is_wrong_is_said_once(caplog):
    caplog.set_level(logging.WARNING)
    named = Named()
    async with following(named) as them:
        for change, says in (
            (lambda: None, "no friendly replica for now: there is none"),
            (lambda: setattr(named, "fails", True), "no friendly replica for now: nobody knows"),
        ):
            change()
            await until(lambda says=says: says in caplog.text)
        asked = named.asked
        await until(lambda: named.asked > asked + 3)
        named.fails, named.ports = False, [66, 7]
        await until(lambda: ports(them) == {7})
    said = [record.getMessage().split(": ")[1] for record in caplog.records]
    assert said == ["there is none", "nobody knows", "of no use"]


async def test_while_connections_come_and_go_it_asks_less_and_less_often(monkeypatch):
    pauses = []
    monkeypatch.setattr(discovery, "EVERY_S", (0.001, 0.008))
    monkeypatch.setattr(discovery.random, "uniform", lambda _, most: pauses.append(most) or most)
    named = Named(1)
    async with following(named) as them:
        async with asyncio.timeout(20):
            while len(pauses) < 8:
                them.turned()
                await asyncio.sleep(0)
        assert pauses == [0.001, 0.002, 0.004, *[0.008] * 5]
        await until(lambda: 0.001 in pauses[8:])  # once all is calm
