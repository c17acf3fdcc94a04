"""Where a replica listens for its peers: a TCP port and, on Linux, a Unix socket.

Knows how to let in those who know the secret, and to bound the others. Knows no message but the
handshake's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import sys
from collections.abc import Awaitable, Callable

from linearized.errors import ConfigError
from serve_apps.link.connection import HEARTBEAT_S, Connection, LinkError, accept
from serve_apps.link.protocol import Endpoint, ProtocolError

MAX_STRANGERS = 32
"""Connections that have not shown yet that they know the secret. One more, and the first of them
has to go: whoever knows the secret needs milliseconds to say so."""
ANY_PORT = (0, 0)

Serve = Callable[[Connection], Awaitable[None]]
log = logging.getLogger(__name__)


class Listener:
    def __init__(
        self,
        serve: Serve,
        *,
        host: str = "127.0.0.1",
        ports: tuple[int, int] = ANY_PORT,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        """`serve` is called with each peer that is let in, in a task of its own, which is cancelled
        at the end. It returns, or raises a LinkError or ProtocolError, when it is done with the
        peer; the connection is closed then. `ports`: the first and the last of those that may be
        used; (0, 0): whichever is free."""
        self._serve = serve
        self._host = host
        self._ports = ports
        self._heartbeat_s = heartbeat_s
        self._secret = secrets.token_bytes(32)
        self._servers: list[asyncio.Server] = []
        self._strangers: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._peers: dict[asyncio.Task[None], Connection] = {}

    @property
    def connections(self) -> list[Connection]:
        """To the peers that are let in."""
        return list(self._peers.values())

    async def start(self, *, fingerprint: str, vocab_size: int, tokenizer: str = "") -> Endpoint:
        """Listen; where, and with what secret.

        Raises:
            ConfigError: none of the ports is free.
        """
        tcp = await self._listen()
        self._servers.append(tcp)
        return Endpoint(
            host=self._host,
            port=tcp.sockets[0].getsockname()[1],
            secret=self._secret,
            fingerprint=fingerprint,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            path=await self._listen_nearby(),
        )

    def stop_accepting(self) -> None:
        for server in self._servers:
            server.close()

    async def close(self) -> None:
        self.stop_accepting()
        tasks = [*self._strangers, *self._peers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._servers:
            await server.wait_closed()
        self._servers.clear()

    async def _listen(self) -> asyncio.Server:
        first, last = self._ports
        ports = list(range(first, last + 1))
        random.shuffle(ports)  # replicas that start side by side seldom try the same one
        for port in ports:
            with contextlib.suppress(OSError):
                return await asyncio.start_server(self._accept, self._host, port)
        raise ConfigError(
            f"no port between {first} and {last} is free on {self._host}; allow more of them"
        )

    async def _listen_nearby(self) -> str:
        """An abstract socket: it has no file that would stay behind."""
        if sys.platform != "linux":
            return ""
        path = f"\0linearized-{secrets.token_hex(8)}"
        self._servers.append(await asyncio.start_unix_server(self._accept, path))
        return path

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._strangers[task] = writer
        if len(self._strangers) > MAX_STRANGERS:
            next(iter(self._strangers.values())).transport.abort()
        try:
            connection = await accept(reader, writer, self._secret, heartbeat_s=self._heartbeat_s)
            del self._strangers[task]
            self._peers[task] = connection
            try:
                await self._serve(connection)
            finally:
                await connection.close()
        except (LinkError, ProtocolError) as error:
            log.info("link: %s", error)
        except asyncio.CancelledError:
            pass  # a task of asyncio's own: raising would only be logged
        finally:
            self._strangers.pop(task, None)
            self._peers.pop(task, None)
