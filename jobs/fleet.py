"""An app of processes on this machine, without Ray: ingresses, targets and drafts that talk over
the link, through a network that can fail, and are replaced when they die. For trying what happens
then, hundreds of times in minutes: a new process takes a second.

    async with Fleet(target, draft, targets=2) as fleet:
        fleet.kill("target")

Knows processes and how they find each other; knows no request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Self

import psutil

from jobs import members
from jobs.members import HEARTBEAT_S
from jobs.proxy import Proxy
from linearized.errors import ClusterError
from serve_apps.draft.replica import DraftConfig
from serve_apps.http.ingress import IngressConfig
from serve_apps.link.protocol import Endpoint
from serve_apps.target.config import TargetConfig

KINDS = ("ingress", "target", "draft", "liar")
"""A liar is a draft whose trees make no sense."""
START_S = 300.0


@dataclass(eq=False)
class Member:
    """One process."""

    kind: str
    process: ForkServerProcess
    pipe: Connection
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    proxy: Proxy | None = None
    endpoint: Endpoint | None = None
    """Where the others reach it: at its proxy."""
    answer: asyncio.Future[dict[str, float]] | None = None

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid


class Fleet:
    def __init__(
        self,
        target: Path,
        draft: Path | None = None,
        *,
        ingresses: int = 1,
        targets: int = 2,
        drafts: int = 1,
        liars: int = 0,
        settings: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """`settings` are more of the replicas' own, by kind: of IngressConfig, TargetConfig, …; of
        the ingress also `patience_s`."""
        self.url = f"http://127.0.0.1:{_free_port()}"
        self._model, self._draft = target, draft or target
        self._counts = dict(zip(KINDS, (ingresses, targets, drafts, liars), strict=True))
        self._settings = settings or {}
        self._context = multiprocessing.get_context("forkserver")
        # Whoever is started is forked from a process that has imported all this already.
        self._context.set_forkserver_preload([members.__name__])
        self._members: list[Member] = []
        self._changed = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._links: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="fleet-")
        self._publish()
        self._keeping = asyncio.create_task(self._keep())
        try:
            for kind in KINDS:
                await self.up(kind)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        for member in list(self._members):
            member.process.kill()
            await self._bury(member)
        await asyncio.gather(*self._links, return_exceptions=True)
        self._folder.cleanup()

    def all(self, kind: str) -> list[Member]:
        """Those that are ready."""
        return [one for one in self._members if one.kind == kind and one.ready.is_set()]

    async def up(self, kind: str, count: int | None = None) -> None:
        """Wait until so many are ready; None: as many as there should be.

        Raises:
            ClusterError: they are not within START_S.
        """
        wanted = self._counts[kind] if count is None else count
        try:
            async with asyncio.timeout(START_S):
                while len(self.all(kind)) < wanted:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise ClusterError(f"no {wanted} of {kind} within {START_S:.0f} s") from None

    def kill(self, kind: str, how: signal.Signals = signal.SIGKILL) -> Member:
        """One of them, drawn at random."""
        member = random.choice(self.all(kind))
        os.kill(member.pid, how)
        return member

    def proxies(self, kind: str) -> list[Proxy]:
        return [member.proxy for member in self.all(kind) if member.proxy is not None]

    def scale(self, kind: str, count: int) -> None:
        """Those that are too many are asked to end; missing ones are started."""
        self._counts[kind] = count
        for member in [one for one in self._members if one.kind == kind][count:]:
            member.process.terminate()
        self._changed.set()

    async def renew(self, kind: str) -> None:
        """Replace all, each by one that is ready before it is asked to end: a roll-out."""
        old, count = self.all(kind), self._counts[kind]
        for member in old:
            self._counts[kind] = count + 1
            self._changed.set()
            await self.up(kind, count + 1)
            self._counts[kind] = count
            member.process.terminate()
            while member in self._members:
                await asyncio.sleep(0.02)

    async def held(self, kind: str) -> list[dict[str, float]]:
        """What each holds: texts, rows, sessions, tasks, file descriptors, bytes of memory; and
        the longest time in which its event loop did nothing since it was asked last."""
        found = [await self._held(member) for member in self.all(kind)]
        return [one for one in found if one]

    async def _held(self, member: Member) -> dict[str, float]:
        """Nothing, if it ends."""
        member.answer = asyncio.get_running_loop().create_future()
        try:
            member.pipe.send_bytes(b"{}")
            async with asyncio.timeout(30):
                found = await member.answer
            if not found:
                return {}
            process = psutil.Process(member.pid)
            return {**found, "fds": process.num_fds(), "rss": process.memory_info().rss}
        except TimeoutError:
            raise ClusterError(f"{member.kind} {member.pid} does not say what it holds") from None
        except (OSError, ValueError, psutil.NoSuchProcess):
            return {}

    async def _keep(self) -> None:
        """As many as there should be."""
        while True:
            for kind, count in self._counts.items():
                for _ in range(count - sum(one.kind == kind for one in self._members)):
                    self._start(kind)
            self._changed.clear()
            await self._changed.wait()

    def _start(self, kind: str) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=members.main,
            args=(kind, theirs, self._config(kind), self._folder.name),
            daemon=True,
        )
        process.start()
        theirs.close()
        member = Member(kind, process, ours)
        self._members.append(member)
        loop = asyncio.get_running_loop()
        loop.add_reader(ours.fileno(), self._hear, member)
        loop.add_reader(process.sentinel, self._spawn, self._bury, member)

    def _config(self, kind: str) -> Any:
        more = self._settings.get(kind, {})
        if kind == "ingress":
            port = int(self.url.rpartition(":")[2])
            options = dict(more)
            patience_s = options.pop("patience_s", 60.0)
            return port, patience_s, self._model, IngressConfig(**options)
        beat = {"heartbeat_s": HEARTBEAT_S, "pack": False}
        if kind == "target":
            return bool(self._counts["draft"] or self._counts["liar"]), TargetConfig(
                **{"path": str(self._model), **beat, **more}
            )
        return DraftConfig(**{"path": str(self._draft), **beat, **more})

    def _hear(self, member: Member) -> None:
        try:
            said = json.loads(member.pipe.recv_bytes())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(member.pipe.fileno())
            return
        if member.ready.is_set():
            if member.answer is not None and not member.answer.done():
                member.answer.set_result(said)
        else:
            self._spawn(self._meet, member, said)

    def _spawn(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        async def run() -> None:
            await work(*args)

        task = asyncio.create_task(run())
        self._links.add(task)
        task.add_done_callback(self._links.discard)

    async def _meet(self, member: Member, said: dict[str, Any]) -> None:
        """It is ready, and has said where it listens."""
        if said:
            secret = bytes.fromhex(said.pop("secret"))
            member.proxy = Proxy(Endpoint(secret=secret, **said))
            member.endpoint = await member.proxy.start()
        member.ready.set()
        self._publish()

    async def _bury(self, member: Member) -> None:
        if member not in self._members:
            return
        self._members.remove(member)
        if member.answer is not None and not member.answer.done():
            member.answer.set_result({})
        loop = asyncio.get_running_loop()
        loop.remove_reader(member.process.sentinel)
        loop.remove_reader(member.pipe.fileno())
        member.pipe.close()
        await asyncio.to_thread(member.process.join)
        member.process.close()
        self._publish()
        if member.proxy is not None:
            await member.proxy.close()

    def _publish(self) -> None:
        """Where each can be found; in a file, as those who look for it are other processes."""
        for kind in ("target", "draft"):
            kinds = (kind, "liar") if kind == "draft" else (kind,)
            found = [one.endpoint for one in self._members if one.kind in kinds and one.endpoint]
            rows = [
                [e.host, e.port, e.secret.hex(), e.fingerprint, e.vocab_size, e.tokenizer]
                for e in found
            ]
            place = Path(self._folder.name) / kind
            place.with_suffix(".new").write_text(json.dumps(rows))
            place.with_suffix(".new").replace(place)
        self._changed.set()


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
