"""A network that fails, between the two ends of a link: what crosses it comes late, never, or as
nonsense, or the connection ends. Knows bytes only.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

from serve_apps.link.protocol import Endpoint

PIECE = 2**16


class Proxy:
    """Stands before an endpoint, at a port of its own."""

    def __init__(self, there: Endpoint) -> None:
        self.delay_s = 0.0
        """Seconds that what comes takes to be passed on, in each direction."""
        self.silent = False
        """Is all that comes lost, though both ends take the connection for open? (Half-open, as
        after a cable is pulled.)"""
        self._there = there
        self._server: asyncio.Server | None = None
        self._wires: set[_Wire] = set()
        self._accepting: set[asyncio.Task[Any]] = set()

    @property
    def num_connections(self) -> int:
        return len(self._wires)

    async def start(self) -> Endpoint:
        """What to tell those who want to connect."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        return replace(self._there, host=host, port=port, path="")

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self.drop()
            for task in self._accepting:
                task.cancel()
            await asyncio.gather(*self._accepting, return_exceptions=True)
            await self._server.wait_closed()
            await asyncio.sleep(0)  # what was aborted is closed in the loop's next turn

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def drop(self) -> None:
        """All connections end in the middle of what they carry."""
        for wire in self._wires:
            wire.abort()

    def garble(self, seed: int = 0) -> None:
        """The next that comes is replaced by as many other bytes, on each connection and in both
        directions."""
        draw = random.Random(seed)
        for wire in self._wires:
            wire.garble(draw)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._accepting.add(task)
        try:
            back, there = await asyncio.open_connection(self._there.host, self._there.port)
            await self._join(_Wire(writer, there), (reader, there), (back, writer))
        except OSError:
            pass  # one end is gone, so is the other
        except asyncio.CancelledError:
            pass  # a task of asyncio's own: raising would only be logged
        finally:
            self._accepting.discard(task)
            writer.transport.abort()

    async def _join(
        self,
        wire: _Wire,
        *ways: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._wires.add(wire)
        try:
            passing = (self._pass(wire, *ends, way) for way, ends in enumerate(ways))
            await asyncio.gather(*passing)
        finally:
            self._wires.discard(wire)
            wire.abort()

    async def _pass(
        self, wire: _Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: int
    ) -> None:
        """Read at once and write when it is due: a delay slows nothing down."""
        loop = asyncio.get_running_loop()
        due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                when, data = await due.get()
                await asyncio.sleep(max(0.0, when - loop.time()))
                if not data:
                    wire.abort()
                    return
                writer.write(data)
                await writer.drain()

        delivering = asyncio.create_task(deliver())
        try:
            while data := await reader.read(PIECE):
                if not self.silent:
                    due.put_nowait((loop.time() + self.delay_s, wire.spoil(way, data)))
            due.put_nowait((loop.time() + self.delay_s, b""))
            await delivering
        finally:
            delivering.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await delivering


class _Wire:
    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self._writers = writers
        self._spoils: dict[int, Callable[[int], bytes]] = {}
        """By direction."""

    def abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    def garble(self, draw: random.Random) -> None:
        self._spoils = {0: draw.randbytes, 1: draw.randbytes}

    def spoil(self, way: int, data: bytes) -> bytes:
        other = self._spoils.pop(way, None)
        return data if other is None else other(len(data))
