"""The processes of a fleet: what an ingress, a target, a draft, and a draft that lies do in theirs.

Each finds the others in files, tells its owner over a pipe that it is ready, and what it holds when
asked. Knows nothing of the other processes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import signal
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import uvicorn

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

DRAIN_S = 10.0
"""Seconds that a target which is asked to end waits for its texts."""
HEARTBEAT_S = 0.5
TICK_S = 0.001


def main(kind: str, pipe: Connection, config: Any, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=os.environ.get("FLEET_LOG", "CRITICAL"))
    try:
        asyncio.run(_RUNS[kind](config, Owner(pipe), folder))
    except Exception:
        traceback.print_exc()
        raise


class Owner:
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
    given: tuple[int, float, Path, IngressConfig], owner: Owner, folder: str
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


async def _target(given: tuple[bool, TargetConfig], owner: Owner, folder: str) -> None:
    drafted, config = given
    replica = TargetReplica(config, _finder(folder, "draft") if drafted else None)
    endpoint = await replica.endpoint()
    owner.is_ready(replica.held, endpoint)
    await owner.asked_to_end()
    await replica.close(drain_s=DRAIN_S)


async def _replica_of_a_draft(config: DraftConfig, owner: Owner, folder: str) -> None:
    replica = DraftReplica(config)
    endpoint = await replica.endpoint()
    owner.is_ready(lambda: {"sessions": replica.num_sessions}, endpoint)
    await owner.asked_to_end()
    await replica.close()


async def _liar(config: DraftConfig, owner: Owner, folder: str) -> None:
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


_RUNS: dict[str, Callable[[Any, Owner, str], Coroutine[Any, Any, None]]] = {
    "ingress": _ingress,
    "target": _target,
    "draft": _replica_of_a_draft,
    "liar": _liar,
}
