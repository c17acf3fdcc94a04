"""What clients notice when parts of the app fail: texts that are the same as in calm, clear errors,
and the longest time in which a stream stood still.

    python -m jobs.faults --target runs/mine/target --draft runs/mine/draft --kills 200

Runs ingress, targets and drafts as processes of their own (see `jobs.fleet`), lets eight streams of
different kinds go on in them, and then kills, stops, slows down or fools something. Ends with one
line of JSON, and with status 1 if a text was another one, or something was left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from jobs import measure
from jobs.fleet import Fleet
from jobs.measure import Machine, last_line, show
from jobs.streams import Count, Streams

QUIET_S = 30.0
"""Seconds within which nothing may be left of texts that have ended."""
HELD = ("texts", "rows", "pieces", "paused", "sessions")
SETTINGS = {
    "ingress": {"max_body": 16 * 2**20},
    "target": {"max_sessions": 8, "max_waiting": 8},
}
"""Of the fleet: small, so that a few dozen texts are too many."""

Strike = Callable[[Fleet, Streams], Awaitable[None]]


@dataclass
class Row:
    """What became of one kind of fault."""

    fault: str
    tries: int = 0
    same: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    gap: float = 0.0
    quiet_s: float = 0.0
    """The longest time until nothing of the texts was left."""
    left: list[str] = field(default_factory=list)
    """What was left behind after QUIET_S."""

    @property
    def good(self) -> bool:
        """Whether every text was the same or had an error that is allowed."""
        return not self.wrong and not self.left and set(self.errors) <= ALLOWED[self.fault]

    def add(self, count: Count) -> None:
        self.tries += 1
        self.same += count.same
        self.errors += count.errors
        self.wrong += count.wrong
        self.gap = max(self.gap, count.gap)


# How things fail. Each ends when all is as before, but for what has died.


def kill(*kinds: str) -> Strike:
    async def strike(fleet: Fleet, _: Streams) -> None:
        for kind in kinds:
            fleet.kill(kind)

    return strike


def terminate(kind: str) -> Strike:
    async def strike(fleet: Fleet, _: Streams) -> None:
        fleet.kill(kind, signal.SIGTERM)

    return strike


def stop(kind: str, seconds: float) -> Strike:
    """It hangs for so long."""

    async def strike(fleet: Fleet, _: Streams) -> None:
        member = fleet.kill(kind, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(member.pid, signal.SIGCONT)

    return strike


def delay(kind: str, seconds: float) -> Strike:
    """Its link takes so much longer, until all texts have ended."""

    async def strike(fleet: Fleet, _: Streams) -> None:
        for proxy in fleet.proxies(kind):
            proxy.delay_s = seconds

    return strike


def drop(kind: str) -> Strike:
    async def strike(fleet: Fleet, _: Streams) -> None:
        for proxy in fleet.proxies(kind):
            proxy.drop()

    return strike


def half_open(kind: str, seconds: float) -> Strike:
    """One of the links says nothing for so long, and nobody is told."""

    async def strike(fleet: Fleet, _: Streams) -> None:
        proxy = random.choice(fleet.proxies(kind))
        proxy.silent = True
        await asyncio.sleep(seconds)
        proxy.silent = False
        proxy.drop()  # what was lost is missing

    return strike


def garble(kind: str) -> Strike:
    async def strike(fleet: Fleet, _: Streams) -> None:
        for proxy in fleet.proxies(kind):
            proxy.garble(random.randrange(2**32))

    return strike


async def fewer_and_more(fleet: Fleet, _: Streams) -> None:
    fleet.scale("target", 1)
    await asyncio.sleep(0.5)
    fleet.scale("target", 2)


async def roll_out(fleet: Fleet, _: Streams) -> None:
    await fleet.renew("target")


async def nothing(fleet: Fleet, _: Streams) -> None:
    """For comparison."""


async def too_many(fleet: Fleet, streams: Streams) -> None:
    """Ten times as many as fit: those that are refused know when to come back."""
    flood = await streams.all(times=10)
    assert not flood.wrong and set(flood.errors) <= {"overloaded"}, flood


async def leave(fleet: Fleet, streams: Streams) -> None:
    """200 clients ask, hear something or nothing, and are gone."""
    draw = random.Random(0)

    async def one() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(draw.uniform(0.05, 1.5)):
                await streams.ask(draw.choice(list(streams.calm)))

    for _ in range(10):
        await asyncio.gather(*(one() for _ in range(20)))


async def read_slowly(fleet: Fleet, streams: Streams) -> None:
    """A client reads a byte a second for a while, then the rest; its text is the same."""
    body = json.dumps(streams.body("logprobs")).encode()
    host, port = fleet.url.removeprefix("http://").split(":")
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    wire.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(wire, (host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    await loop.sock_sendall(wire, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    heard = b""
    for _ in range(5):
        await asyncio.sleep(1.0)
        heard += await loop.sock_recv(wire, 1)
    async with asyncio.timeout(60):
        while some := await loop.sock_recv(wire, 2**16):
            heard += some
    wire.close()
    told = streams.calm["logprobs"].told
    assert told is not None
    lines = [line for line in heard.decode().splitlines() if line.startswith("data: {")]
    text = "".join(c["text"] for line in lines for c in json.loads(line[6:])["choices"])
    assert text == told.texts[0] and b"[DONE]" in heard, "the slow reader's text is another one"


def hostile_bodies() -> dict[str, bytes]:
    """Bodies that cost a careless server seconds."""
    size = 10 * 2**20

    def filled(unit: bytes, before: bytes = b'{"prompt":[', after: bytes = b"]}") -> bytes:
        return before + b",".join([unit] * (size // (len(unit) + 1))) + after

    def text(unit: bytes, name: bytes = b"prompt") -> bytes:
        return b'{"' + name + b'":"' + unit * (size // len(unit)) + b'"}'

    schema = b'{"prompt":"a","guided":{"json_schema":{"title":"' + b"x" * size + b'"}}}'
    return {
        "10 MB of texts": filled(b'"a"'),
        "10 MB of numbers": filled(b"1"),
        "10 MB of lists": filled(b"[]"),
        "10 MB of names": b"{" + b",".join(b'"%d":1' % i for i in range(size // 12)) + b"}",
        "10 MB of depth": b'{"prompt":' + b"[" * (size // 2) + b"]" * (size // 2) + b"}",
        "100,000 token ids": b'{"prompt":[' + b",".join([b"5"] * 100_000) + b"]}",
        "60,000 wrong elements": b'{"prompt":[' + b",".join([b'"a"'] * 60_000) + b"]}",
        "10 MB of a letter": text(b"a"),
        "10 MB of escapes": text(rb"\u0041"),
        "10 MB of NUL": text(rb"\u0000"),
        "10 MB of half surrogates": text(rb"\ud800"),
        "10 MB of commas": text(b","),
        "a name of 10 MB": text(b"x", b"model"),
        "a schema of 10 MB": schema,
        "a chat of 10 MB": filled(
            b'{"role":"user","content":"' + b"x" * 20_000 + b'"}', b'{"messages":['
        ),
    }


async def hostile(fleet: Fleet, streams: Streams) -> None:
    for body in hostile_bodies().values():
        answer = await streams.client.post("/v1/completions", content=body)
        assert 400 <= answer.status_code < 500, answer.text


OWN = frozenset({"broken", "unavailable", "not_ready"})
"""What may become of requests whose ingress has died, or ends."""
FAULTS: dict[str, tuple[Strike, frozenset[str]]] = {
    "nothing": (nothing, frozenset()),
    "kill -9 of a draft": (kill("draft"), frozenset()),
    "kill -9 of a target": (kill("target"), frozenset()),
    "kill -9 of a target and a draft": (kill("target", "draft"), frozenset()),
    "kill -9 of the ingress": (kill("ingress"), OWN),
    "SIGTERM to a target": (terminate("target"), frozenset()),
    "SIGTERM to a draft": (terminate("draft"), frozenset()),
    "a target stopped for 3 s": (stop("target", 3.0), frozenset()),
    "a draft stopped for 3 s": (stop("draft", 3.0), frozenset()),
    "one target fewer, one more": (fewer_and_more, frozenset()),
    "a roll-out of targets": (roll_out, frozenset()),
    "drafts 45 ms away": (delay("draft", 0.045), frozenset()),
    "drafts 500 ms away": (delay("draft", 0.5), frozenset()),
    "targets 45 ms away": (delay("target", 0.045), frozenset()),
    "targets 500 ms away": (delay("target", 0.5), frozenset()),
    "drafts' links dropped": (drop("draft"), frozenset()),
    "targets' links dropped": (drop("target"), frozenset()),
    "a draft's link half-open": (half_open("draft", 3.0), frozenset()),
    "a target's link half-open": (half_open("target", 3.0), frozenset()),
    "garbage from and to drafts": (garble("draft"), frozenset()),
    "garbage from and to targets": (garble("target"), frozenset()),
    "a full queue": (too_many, frozenset({"overloaded"})),
    "a client that reads a byte a second": (read_slowly, frozenset()),
    "200 clients that leave": (leave, frozenset({"overloaded"})),
    "hostile bodies": (hostile, frozenset()),
}
KILLS = [name for name in FAULTS if name.startswith("kill")]
LIES = "trees that cannot be"
ALLOWED = {name: allowed for name, (_, allowed) in FAULTS.items()} | {LIES: frozenset()}


async def endure(
    fleet: Fleet,
    streams: Streams,
    faults: dict[str, int],
    chunks: int,
    *,
    seed: int = 0,
    tell: Callable[[str], None] = lambda said: None,
) -> list[Row]:
    """Each of the faults so many times, in an order that is drawn. `chunks`: how many all streams
    give together; the fault comes amid them. `tell` hears how far it is."""
    draw = random.Random(seed)
    rows = {name: Row(name) for name in faults}
    order = [name for name, tries in faults.items() for _ in range(tries)]
    draw.shuffle(order)
    for number, name in enumerate(order, start=1):
        strike = FAULTS[name][0] if name in FAULTS else nothing
        count = await streams.all(
            lambda strike=strike: strike(fleet, streams),  # type: ignore[misc]
            at=draw.randrange(1, max(2, chunks // 2)),
        )
        rows[name].add(count)
        for proxy in [*fleet.proxies("target"), *fleet.proxies("draft")]:
            proxy.delay_s = 0.0
        began = time.monotonic()
        left = await left_behind(fleet)
        rows[name].quiet_s = max(rows[name].quiet_s, time.monotonic() - began)
        rows[name].left += left
        for kind in ("ingress", "target", "draft"):
            await fleet.up(kind)
        errors = sum(count.errors.values())
        said = f"{count.same} texts the same, {errors} errors, {len(count.wrong)} wrong"
        tell(f"{number}/{len(order)} {name}: {said}, longest gap {count.gap:.2f} s")
    return list(rows.values())


async def left_behind(fleet: Fleet) -> list[str]:
    """What processes hold of texts that have ended, if it is not gone within QUIET_S."""
    deadline = time.monotonic() + QUIET_S
    while True:
        found = [
            f"{kind}: {held[name]:.0f} {name}"
            for kind in ("ingress", "target", "draft")
            for held in await fleet.held(kind)
            for name in HELD
            if held.get(name)
        ]
        if not found or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.05)


def main(
    target: Annotated[Path, typer.Option(help="Folder of the model.")],
    draft: Annotated[Path | None, typer.Option(help="Folder of the draft model.")] = None,
    kills: Annotated[int, typer.Option(help="Processes to kill, of all kinds together.")] = 40,
    tries: Annotated[int, typer.Option(help="Of each other fault.")] = 2,
    tokens: Annotated[int, typer.Option(help="New tokens of a text.")] = 150,
    seed: Annotated[int, typer.Option(help="Of the order and the moments.")] = 0,
) -> None:
    """Let the app fail in all the ways there are, and listen."""
    console = measure.console()
    machine = Machine.measure(torch.device("cpu"), torch.float32)
    console.print(str(machine))
    rows = asyncio.run(_run(target, draft, kills, tries, tokens, seed))
    columns = [
        "fault",
        "tries",
        "same",
        "errors",
        "wrong",
        "longest gap s",
        "quiet after s",
        "left",
    ]
    show(
        "8 streams, and what happened to them",
        columns,
        [
            [
                row.fault,
                str(row.tries),
                str(row.same),
                " ".join(f"{n} {code}" for code, n in row.errors.items()) or "0",
                str(len(row.wrong)),
                f"{row.gap:.2f}",
                f"{row.quiet_s:.2f}",
                " ".join(row.left) or "nothing",
            ]
            for row in rows
        ],
        console,
    )
    config = {"target": str(target), "draft": str(draft or ""), "tokens": tokens, "seed": seed}
    results: dict[str, Any] = {row.fault: {**vars(row), "good": row.good} for row in rows}
    print(last_line("faults", machine, config=config, results=results))
    if not all(row.good for row in rows):
        for row in rows:
            for one in row.wrong[:3]:
                console.print(f"{row.fault}: {one[:2000]}")
        raise typer.Exit(1)


async def _run(
    target: Path, draft: Path | None, kills: int, tries: int, tokens: int, seed: int
) -> list[Row]:
    faults = {name: tries for name in FAULTS}
    faults |= {name: -(-kills // len(KILLS)) for name in KILLS}
    rows: list[Row] = []
    for some, counts in ((faults, {"drafts": 2}), ({LIES: tries}, {"drafts": 0, "liars": 2})):
        async with Fleet(target, draft, settings=SETTINGS, **counts) as fleet:
            streams = Streams(fleet.url, target.name, tokens=tokens)
            try:
                chunks = await streams.learn()
                rows += await endure(fleet, streams, some, chunks, seed=seed, tell=typer.echo)
            finally:
                await streams.close()
    return rows


if __name__ == "__main__":
    typer.run(main)
