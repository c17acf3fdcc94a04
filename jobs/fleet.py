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
import gc
import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Self

import psutil
import torch
import uvicorn

from jobs.proxy import Proxy
from linearized.errors import ClusterError
from linearized.speculative import TokenTree
from serve_apps.draft.replica import DraftConfig, DraftReplica
from serve_apps.http.ingress import IngressConfig, http_app
from serve_apps.http.models import Model
from serve_apps.http.relay import Relay
from serve_apps.link.connection import Connection as Link
from serve_apps.link.connection import LinkError
from serve_apps.link.listener import Listener
from serve_apps.link.protocol import Commit, Draft, Endpoint, Open
from serve_apps.link.targets import Targets
from serve_apps.target.config import TargetConfig
from serve_apps.target.replica import TargetReplica

KINDS = ("ingress", "target", "draft", "liar")
"""A liar is a draft whose trees make no sense."""
START_S = 300.0
DRAIN_S = 10.0
"""Seconds that a target which is asked to end waits for its texts."""
HEARTBEAT_S = 0.5
TICK_S = 0.001

log = logging.getLogger(__name__)


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
        self._context.set_forkserver_preload([__name__])
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
            target=_main, args=(kind, theirs, self._config(kind), self._folder.name), daemon=True
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


# What follows runs in the processes.


def _main(kind: str, pipe: Connection, config: Any, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=os.environ.get("FLEET_LOG", "CRITICAL"))
    try:
        asyncio.run(_RUNS[kind](config, _Owner(pipe), folder))
    except Exception:
        traceback.print_exc()
        raise


class _Owner:
    """The other end of the pipe. When it is gone, so is this process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._stop = asyncio.Event()
        self._longest = 0.0
        self._last = time.perf_counter()
        """When the event loop was seen at work."""
        self._ticking: asyncio.Task[None] | None = None
        self._count: Callable[[], dict[str, int]] = dict

    def is_ready(self, count: Callable[[], dict[str, int]], endpoint: Endpoint | None) -> None:
        loop = asyncio.get_running_loop()
        self._count = count
        gc.collect()
        gc.freeze()  # what is there now stays; to look through it takes long
        self._ticking = asyncio.create_task(self._tick())
        loop.add_reader(self._pipe.fileno(), self._answer)
        told: dict[str, Any] = {}
        if endpoint is not None:
            told = {name: getattr(endpoint, name) for name in ("host", "port", "fingerprint")}
            told |= {"secret": endpoint.secret.hex(), "vocab_size": endpoint.vocab_size}
        self._pipe.send_bytes(json.dumps(told).encode())

    async def asked_to_end(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop.set)
        await self._stop.wait()

    def _answer(self) -> None:
        try:
            self._pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)
        stall = max(self._longest, time.perf_counter() - self._last - TICK_S)
        gc.collect()
        found: dict[str, float] = {**self._count(), "stall": stall}
        found["tasks"] = len(asyncio.all_tasks())
        self._pipe.send_bytes(json.dumps(found).encode())
        self._longest, self._last = 0.0, time.perf_counter()

    async def _tick(self) -> None:
        self._last = time.perf_counter()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.perf_counter()
            self._longest = max(self._longest, now - self._last - TICK_S)
            self._last = now


def _finder(folder: str, kind: str) -> Callable[[], Awaitable[Sequence[Endpoint]]]:
    async def find() -> list[Endpoint]:
        rows = json.loads((Path(folder) / kind).read_text())
        return [
            Endpoint(
                host=host,
                port=port,
                secret=bytes.fromhex(secret),
                fingerprint=fingerprint,
                vocab_size=vocab_size,
                tokenizer=tokenizer,
            )
            for host, port, secret, fingerprint, vocab_size, tokenizer in rows
        ]

    return find


async def _ingress(
    given: tuple[int, float, Path, IngressConfig], owner: _Owner, folder: str
) -> None:
    port, patience_s, path, config = given
    targets = Targets(_finder(folder, "target"), heartbeat_s=HEARTBEAT_S)
    model = Model(path.name, str(path), Relay(targets, patience_s=patience_s))
    app = http_app([model], config)
    options: dict[str, Any] = {"host": "127.0.0.1", "port": port, "log_level": "critical"}
    server = uvicorn.Server(uvicorn.Config(app, ws="none", timeout_keep_alive=600, **options))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    await targets.ready()

    def count() -> dict[str, int]:
        return {"texts": sum(link.num_texts for link in targets.links)}

    owner.is_ready(count, None)
    await serving


async def _target(given: tuple[bool, TargetConfig], owner: _Owner, folder: str) -> None:
    drafted, config = given
    replica = TargetReplica(config, _finder(folder, "draft") if drafted else None)
    endpoint = await replica.endpoint()
    owner.is_ready(replica.held, endpoint)
    await owner.asked_to_end()
    await replica.close(drain_s=DRAIN_S)


async def _replica_of_a_draft(config: DraftConfig, owner: _Owner, folder: str) -> None:
    replica = DraftReplica(config)
    endpoint = await replica.endpoint()
    owner.is_ready(lambda: {"sessions": replica.num_sessions}, endpoint)
    await owner.asked_to_end()
    await replica.close()


async def _liar(config: DraftConfig, owner: _Owner, folder: str) -> None:
    """Answers whatever it is asked with a tree that cannot be: unknown tokens, the same guess
    twice, another text's length, other sessions and epochs; sometimes it hangs up."""
    vocab_size = json.loads((Path(config.path) / "config.json").read_text())["vocab_size"]
    draw = random.Random(0)

    async def serve(link: Link) -> None:
        while True:
            message = await link.receive()
            if isinstance(message, Open | Commit):
                length = len(message.tokens)
                base = length if isinstance(message, Open) else message.base + length
                for lie in _lies(message.session, message.epoch, base, vocab_size, draw):
                    link.send(lie)
            if draw.random() < 0.01:
                raise LinkError("enough of it")

    listener = Listener(serve, heartbeat_s=HEARTBEAT_S)
    endpoint = await listener.start(fingerprint="of a liar", vocab_size=vocab_size)
    owner.is_ready(lambda: {"sessions": 0}, endpoint)
    await owner.asked_to_end()
    await listener.close()


def _lies(
    session: int, epoch: int, base: int, vocab_size: int, draw: random.Random
) -> Iterator[Draft]:
    size = draw.randrange(1, 64)
    parents = tuple(draw.randrange(-1, node) for node in range(size))
    unknown = draw.choice([vocab_size, 10 * vocab_size, 2**31 - 1])
    trees = [
        TokenTree(tuple(draw.randrange(vocab_size) for _ in range(size)), parents),
        TokenTree((unknown,) * size, parents),
        TokenTree((7,) * size, (-1,) * size),
        TokenTree.chain([draw.randrange(vocab_size) for _ in range(200)]),
        TokenTree.empty,
    ]
    places = [(session, epoch, base), (session, epoch, base + 1000), (session, epoch, 0)]
    places += [(session + 1, epoch, base), (session, epoch + 1, base)]
    for _ in range(draw.randrange(3)):
        yield Draft(*draw.choice(places), draw.choice(trees))
    yield Draft(session, epoch, base, draw.choice(trees))


_RUNS: dict[str, Callable[[Any, _Owner, str], Coroutine[Any, Any, None]]] = {
    "ingress": _ingress,
    "target": _target,
    "draft": _replica_of_a_draft,
    "liar": _liar,
}


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
