"""One authenticated connection that carries messages. Knows bytes, time and the secret; knows
nothing of sessions.

Both ends prove that they know the secret without sending it. What follows is neither encrypted nor
signed: run the link inside the cluster's network only.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import socket
from collections import deque

from linearized.errors import LinearizedError
from serve_apps.link.protocol import (
    HEADER,
    MAX_FRAME,
    MAX_HANDSHAKE,
    VERSION,
    Challenge,
    Endpoint,
    Heartbeat,
    Hello,
    Message,
    ProtocolError,
    Welcome,
    decode,
    frame,
    frame_size,
    pack,
)

HANDSHAKE_S = 5.0
HEARTBEAT_S = 2.0
SILENT = 3
"""Number of heartbeats that may be missing before the peer counts as gone."""
MAX_UNSENT = 2 * MAX_FRAME
"""Number of bytes that may wait for a peer that does not read. Beyond that it counts as gone."""
SPLIT = 2**18
"""Bytes of messages after which another frame begins, so that a reader does not decode for long
without a pause."""


class LinkError(LinearizedError):
    """The connection cannot be made or has ended."""


async def dial(endpoint: Endpoint, *, heartbeat_s: float = HEARTBEAT_S) -> Connection:
    """Connect to a replica.

    Raises:
        LinkError: nobody answers there, or not with this secret or version.
    """
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            connection = Connection(*await _open(endpoint))
            try:
                await _greet(connection, endpoint.secret)
            except BaseException:
                await connection.abort()
                raise
    except (OSError, ProtocolError) as error:  # TimeoutError is an OSError
        reason = str(error) or type(error).__name__
        raise LinkError(f"no link to {endpoint.host}:{endpoint.port}: {reason}") from error
    connection.keep_alive(heartbeat_s)
    return connection


async def accept(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    secret: bytes,
    *,
    heartbeat_s: float = HEARTBEAT_S,
) -> Connection:
    """Let a peer in.

    Raises:
        LinkError: it does not know the secret, speaks another version, or says nothing.
    """
    connection = Connection(reader, writer)
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            nonce = secrets.token_bytes(32)
            connection.send(Challenge(VERSION, nonce))
            hello = await connection.receive(limit=MAX_HANDSHAKE)
            if not isinstance(hello, Hello) or hello.version != VERSION:
                raise LinkError(f"the peer does not speak version {VERSION} of the link")
            proof = _proof(secret, b"dialer", nonce, hello.nonce)
            if not hmac.compare_digest(hello.proof, proof):
                raise LinkError("the peer does not know the secret")
            connection.send(Welcome(_proof(secret, b"listener", nonce, hello.nonce)))
    except (OSError, ProtocolError) as error:
        await connection.abort()
        raise LinkError(f"handshake failed: {error or type(error).__name__}") from error
    except BaseException:
        await connection.abort()
        raise
    connection.keep_alive(heartbeat_s)
    return connection


class Connection:
    """Messages in both directions. `send` never waits; `receive` waits until the peer speaks or is
    gone. What is sent in one turn of the event loop leaves in one frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._unsent: list[bytes] = []
        self._num_unsent = 0
        """Bytes in it."""
        self._received: deque[Message] = deque()
        self._heard = True
        """Since the last heartbeat."""
        self._alive: asyncio.Task[None] | None = None
        wire = writer.get_extra_info("socket")
        if wire is not None and wire.family != socket.AF_UNIX:
            # A frame is a few bytes that somebody waits for: never wait to fill a packet.
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def closed(self) -> bool:
        return self._writer.is_closing()

    def send(self, message: Message) -> None:
        """Send it with what else is sent before the event loop's next turn. Nothing happens if the
        connection is closed; a peer that has not read MAX_UNSENT bytes is dropped.

        Raises:
            ProtocolError: the message is too long.
        """
        if self.closed:
            return
        packed = pack(message)
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        elif self._num_unsent + len(packed) > SPLIT:
            self._write()
        self._unsent.append(packed)
        self._num_unsent += len(packed)

    async def receive(self, *, limit: int = MAX_FRAME) -> Message:
        """The next message; heartbeats are not shown.

        Raises:
            LinkError: the connection has ended. ProtocolError: the peer speaks nonsense.
        """
        while not self._received:
            try:
                header = await self._reader.readexactly(HEADER)
                payload = await self._reader.readexactly(frame_size(header, limit=limit))
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                raise LinkError("the peer closed the connection") from error
            self._heard = True
            found = decode(payload)
            self._received += [one for one in found if not isinstance(one, Heartbeat)]
        return self._received.popleft()

    async def room(self) -> None:
        """Wait until little is unsent.

        Raises:
            LinkError: the connection has ended.
        """
        self._flush()
        try:
            await self._writer.drain()
        except ConnectionError as error:
            raise LinkError("the peer closed the connection") from error

    def keep_alive(self, every_s: float) -> None:
        """Send heartbeats, and drop the connection when the peer's fail to come."""
        self._alive = asyncio.create_task(self._beat(every_s))

    def drop(self) -> None:
        """End it at once; whatever is unsent is lost."""
        if self._alive is not None:
            self._alive.cancel()
        self._unsent.clear()
        self._writer.transport.abort()

    async def abort(self) -> None:
        """Drop it and wait until its socket is closed."""
        self.drop()
        await self.close()

    async def close(self) -> None:
        """Send what is unsent, then end it."""
        if self._alive is not None:
            self._alive.cancel()
        self._flush()
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()

    def _flush(self) -> None:
        if self._unsent and not self.closed:
            self._write()

    def _write(self) -> None:
        self._writer.write(frame(self._unsent))
        self._unsent, self._num_unsent = [], 0
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT:
            self.drop()

    async def _beat(self, every_s: float) -> None:
        """Missing heartbeats are counted, not timed: after a pause of this process, what the peer
        has sent in the meantime has not been read yet."""
        missing = 0
        while not self.closed:
            self.send(Heartbeat())
            await asyncio.sleep(every_s)
            missing = 0 if self._heard else missing + 1
            self._heard = False
            if missing >= SILENT:
                self._writer.transport.abort()
                return


async def _open(endpoint: Endpoint) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if endpoint.path:
        with contextlib.suppress(OSError):  # it is on another machine
            return await asyncio.open_unix_connection(endpoint.path)
    return await asyncio.open_connection(endpoint.host, endpoint.port)


async def _greet(connection: Connection, secret: bytes) -> None:
    challenge = await connection.receive(limit=MAX_HANDSHAKE)
    if not isinstance(challenge, Challenge) or challenge.version != VERSION:
        raise LinkError(f"the peer does not speak version {VERSION} of the link")
    nonce = secrets.token_bytes(32)
    connection.send(Hello(VERSION, nonce, _proof(secret, b"dialer", challenge.nonce, nonce)))
    welcome = await connection.receive(limit=MAX_HANDSHAKE)
    proof = _proof(secret, b"listener", challenge.nonce, nonce)
    if not isinstance(welcome, Welcome) or not hmac.compare_digest(welcome.proof, proof):
        raise LinkError("the peer does not know the secret")


def _proof(secret: bytes, role: bytes, listeners: bytes, dialers: bytes) -> bytes:
    """`role` keeps one side's proof from being sent back as the other's."""
    return hmac.digest(secret, role + listeners + dialers, "sha256")
