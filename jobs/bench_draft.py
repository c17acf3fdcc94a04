"""A draft in a process of its own, beside plain decoding and beside the same pair taking turns in
one process: one text at a time, one thread a model, no door and no Ray.

    python -m jobs.pair bench            # once: trains what is measured
    python -m jobs.bench_draft           # on a machine with two cores that does nothing else
    python -m jobs.bench_draft --quick   # for a look, not for figures

On held-out prompts, greedy, in turns: how many times faster than plain decoding, what a round
takes and of what, processor time of both ends; then the same with drafts that come late, are
wrong, hang or die, where plain speed is what should remain. Ends with one line of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import transformers
import typer

import linearized
from jobs import measure
from jobs.measure import Bar, Machine, Timing, last_line, show, show_bars
from linearized.errors import DataError, LinearizedError
from linearized.speculative import Sampling
from linearized.training.blocks import Blocks
from serve_apps.draft.replica import DraftConfig, DraftReplica
from serve_apps.generation import Delta, Finished, Generation
from serve_apps.link.protocol import Endpoint
from serve_apps.target.config import TargetConfig
from serve_apps.target.replica import TargetReplica

PLAIN, TURNS, REPLICA = "plain", "taking turns", "replica"
LATE = {"late, 45 ms": 0.045, "late, 500 ms": 0.5}
WRONG, HUNG, DEAD = "wrong", "hung", "dead"
CASES = (PLAIN, TURNS, REPLICA, *LATE, WRONG, HUNG, DEAD)
START_S = 600.0
"""Seconds until a draft is warm."""


def main(
    run: Annotated[Path, typer.Option(help="What jobs.pair made.")] = Path("runs/bench"),
    draft: Annotated[str, typer.Option(help="The draft's folder in it.")] = "draft",
    case: Annotated[
        list[str] | None, typer.Option(help="Only this one; may be given again. Default: all.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens of a text.")] = 128,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    turns: Annotated[int, typer.Option(min=2, help="Texts of each case.")] = 12,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
    quick: Annotated[bool, typer.Option(help="Two short texts of each case.")] = False,
) -> None:
    """Measure what a draft replica gives."""
    if quick:
        tokens, turns = 16, 2
    console = measure.console()
    try:
        cases = _chosen(case or CASES)
        prompts = _prompts(run, 1 + turns, prompt)
        machine = Machine.measure(torch.device("cpu"), torch.float32)
        console.print(str(machine))
        sampling = Sampling(temperature=temperature)
        found = compare(
            run / "target", run / draft, prompts, tokens=tokens, sampling=sampling, cases=cases
        )
    except (LinearizedError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    results = {name: one.summary(found[PLAIN]) for name, one in found.items()}
    rows = [[name, *_columns(one)] for name, one in results.items()]
    show(
        f"one text at a time, {prompt} tokens of prompt, {tokens} new ones", COLUMNS, rows, console
    )
    bars = _bars(found)
    show_bars(bars, console)
    config = {
        "run": str(run), "draft": draft, "tokens": tokens, "prompt": prompt, "turns": turns,
        "temperature": temperature,
    }  # fmt: skip
    print(last_line("bench_draft", machine, config=config, results=results, bars=bars))


@dataclass(frozen=True, slots=True)
class Spent:
    """On one text, from its first token on."""

    ids: tuple[int, ...]
    tokens: int
    rounds: int
    seconds: float
    cpu: float
    """Seconds of the target's process."""
    draft_cpu: float
    """Seconds of the draft's, if it has one of its own."""
    parts: dict[str, float]
    """Seconds of the engine, by what; `draft` is waiting where the draft is elsewhere."""
    drafted: int
    accepted: int

    @property
    def per_token(self) -> float:
        return self.seconds / self.tokens


@dataclass(slots=True)
class Found:
    """The texts of one case, in the order of the prompts."""

    texts: list[Spent] = field(default_factory=list)

    def times(self, other: Found) -> list[float]:
        """How many times faster than the other, prompt by prompt."""
        pairs = zip(other.texts, self.texts, strict=True)
        return [theirs.per_token / ours.per_token for theirs, ours in pairs]

    def summary(self, plain: Found) -> dict[str, Any]:
        tokens = sum(text.tokens for text in self.texts)
        rounds = sum(text.rounds for text in self.texts)
        parts: Counter[str] = Counter()
        for text in self.texts:
            parts.update(text.parts)
        return {
            "per_token": Timing.of([text.per_token for text in self.texts]),
            "over_plain": asdict(Timing.of(self.times(plain))),
            "tokens_a_round": tokens / rounds,
            "seconds_a_round": sum(text.seconds for text in self.texts) / rounds,
            "parts_of_a_round": {name: spent / rounds for name, spent in parts.items()},
            "cpu_a_token": sum(text.cpu for text in self.texts) / tokens,
            "draft_cpu_a_token": sum(text.draft_cpu for text in self.texts) / tokens,
            "drafted": sum(text.drafted for text in self.texts),
            "accepted": sum(text.accepted for text in self.texts),
            "same_text": [text.ids for text in self.texts] == [text.ids for text in plain.texts],
        }


def compare(
    target: Path,
    draft: Path,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    sampling: Sampling,
    cases: Sequence[str] = CASES,
) -> dict[str, Found]:
    """Texts for these prompts, each in all cases before the next. The first is for warming up: what
    it takes is not told, and only after it a draft dies or hangs.

    Raises:
        LinearizedError: a model cannot be loaded, or its draft not be started.
    """
    return asyncio.run(_compare(target, draft, prompts, tokens, sampling, cases))


async def _compare(
    target: Path,
    draft: Path,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling,
    cases: Sequence[str],
) -> dict[str, Found]:
    async with contextlib.AsyncExitStack() as stack:
        setups = await _set_up(target, draft, cases, stack)
        found = {name: Found() for name in cases}
        for turn, prompt in enumerate(prompts):
            names = list(cases)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                wanted = Generation(
                    prompt=tuple(prompt), max_tokens=tokens, sampling=sampling,
                    speculate="none" if name == PLAIN else "model",
                )  # fmt: skip
                spent = await _text(setups[name], wanted)
                if turn:
                    found[name].texts.append(spent)
            if not turn:
                for setup in setups.values():
                    setup.fail()
    return found


@dataclass(slots=True)
class _Setup:
    """A target, and a draft if that is in a process of its own."""

    target: TargetReplica
    draft: _Process | None = None
    fail: Callable[[], None] = lambda: None
    """Whatever is to become of the draft."""


async def _set_up(
    target: Path, draft: Path, cases: Sequence[str], stack: contextlib.AsyncExitStack
) -> dict[str, _Setup]:
    """Texts of `plain` are the target's that is linked to a good draft: it has the same to do."""
    folders = {name: draft for name in (REPLICA, HUNG, DEAD)}
    if WRONG in cases:
        folders[WRONG] = _wrong(draft, Path(stack.enter_context(tempfile.TemporaryDirectory())))
    needed = {REPLICA, *({WRONG, HUNG, DEAD} & {*cases})}
    drafts = {name: stack.enter_context(_process(folders[name])) for name in sorted(needed)}
    endpoints = {
        name: await asyncio.to_thread(process.endpoint) for name, process in drafts.items()
    }
    signals = {HUNG: signal.SIGSTOP, DEAD: signal.SIGKILL}
    setups: dict[str, _Setup] = {}
    for name in (REPLICA, *cases):
        if name in setups or name == PLAIN:
            continue
        if name == TURNS:
            replica = TargetReplica(
                TargetConfig(path=str(target), max_sessions=1, draft=str(draft))
            )
            setups[name] = _Setup(replica)
        else:
            origin = REPLICA if name in LATE else name
            process, endpoint = drafts[origin], endpoints[origin]
            if name in LATE:
                endpoint = await stack.enter_async_context(_delayed(endpoint, LATE[name]))
            replica = TargetReplica(
                TargetConfig(path=str(target), max_sessions=1), _finder(endpoint)
            )
            setups[name] = _Setup(replica, process)
            if name in signals:
                setups[name].fail = lambda process=process, name=name: process.send(signals[name])  # type: ignore[misc]
        stack.push_async_callback(replica.close)
        await replica.ready()
    setups[PLAIN] = setups[REPLICA]
    return setups


async def _text(setup: _Setup, wanted: Generation) -> Spent:
    process = setup.draft
    ids: list[int] = []
    began = last = cpu = draft_cpu = 0.0
    first, parts = 0, Counter[str]()
    end: Finished | None = None
    async for event in setup.target.complete(wanted):
        if isinstance(event, Delta):
            last = time.perf_counter()
            ids += event.tokens
            if not began:
                began, first, parts = last, len(ids), Counter(setup.target.seconds)
                cpu, draft_cpu = time.process_time(), process.cpu if process is not None else 0.0
        elif isinstance(event, Finished):
            end = event
    if end is None or end.reason == "error" or len(ids) <= first:
        raise DataError(f"a text ended early, after {len(ids)} tokens; take another prompt")
    spent = Counter(setup.target.seconds)
    return Spent(
        ids=tuple(ids),
        tokens=len(ids) - first,
        rounds=end.rounds - 1,
        seconds=last - began,
        cpu=time.process_time() - cpu,
        draft_cpu=process.cpu - draft_cpu if process is not None else 0.0,
        parts={name: spent[name] - parts[name] for name in spent},
        drafted=sum(end.drafted),
        accepted=sum(end.accepted),
    )


class _Process:
    """A draft replica in a process of its own. It ends with this one, at the latest."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_draft, args=(theirs, str(folder)), daemon=True)
        self._process.start()
        theirs.close()

    def endpoint(self) -> Endpoint:
        """Once it is warm.

        Raises:
            DataError: it does not get there.
        """
        with contextlib.suppress(EOFError):
            if self._pipe.poll(START_S):
                found: Endpoint = self._pipe.recv()
                return found
        raise DataError("a draft did not start; what it says of that stands above")

    @property
    def cpu(self) -> float:
        """Seconds that it has computed so far."""
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def send(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()


@contextlib.contextmanager
def _process(folder: Path) -> Iterator[_Process]:
    process = _Process(folder)
    try:
        yield process
    finally:
        process.close()


def _draft(pipe: Connection, folder: str) -> None:
    async def serve() -> None:
        pipe.send(await DraftReplica(DraftConfig(path=folder)).endpoint())
        with contextlib.suppress(EOFError):
            await asyncio.to_thread(pipe.recv)  # until the benchmark ends

    asyncio.run(serve())


def _finder(endpoint: Endpoint) -> Callable[[], Any]:
    async def find() -> list[Endpoint]:
        return [endpoint]

    return find


@contextlib.asynccontextmanager
async def _delayed(endpoint: Endpoint, seconds: float) -> AsyncIterator[Endpoint]:
    """The same, with so many seconds on the way, in each direction."""
    tasks: set[asyncio.Task[None]] = set()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def write() -> None:
            while True:
                at, data = await waiting.get()
                await asyncio.sleep(max(at - time.monotonic(), 0))
                writer.write(data)

        writing = asyncio.create_task(write())
        try:
            while data := await reader.read(1 << 16):
                waiting.put_nowait((time.monotonic() + seconds, data))
        finally:
            writing.cancel()
            writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        near = await asyncio.open_connection(endpoint.host, endpoint.port)
        for one in (pass_on(reader, near[1]), pass_on(near[0], writer)):
            tasks.add(asyncio.create_task(one))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield replace(endpoint, port=server.sockets[0].getsockname()[1], path="")
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _wrong(draft: Path, folder: Path) -> Path:
    """A model like the draft that has learnt nothing."""
    model = linearized.load(draft)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(draft).save_pretrained(folder)
    return folder


def _chosen(cases: Sequence[str]) -> list[str]:
    unknown = [name for name in cases if name not in CASES]
    if unknown:
        raise DataError(f"there is no case {unknown[0]!r}; choose among: {'; '.join(CASES)}")
    return [name for name in CASES if name in cases or name == PLAIN]


def _prompts(run: Path, count: int, length: int) -> list[list[int]]:
    blocks = Blocks(run / "data" / "held_out")
    if length > blocks.block or count > len(blocks):
        raise DataError(
            f"{count} prompts of {length} tokens are asked for, {len(blocks)} of {blocks.block} "
            "are held out; ask for fewer or shorter ones"
        )
    found: list[list[int]] = blocks.rows([i * len(blocks) // count for i in range(count)]).tolist()
    return [row[:length] for row in found]


COLUMNS = [
    "", "ms a token", "× plain", "tokens a round", "ms a round", "draft or wait", "verify", "rest",
    "CPU ms a token", "of the draft",
]  # fmt: skip


def _columns(one: dict[str, Any]) -> list[str]:
    over, parts = one["over_plain"], dict(one["parts_of_a_round"])
    named = [parts.pop(name, 0.0) for name in ("draft", "verify")]
    between = one["seconds_a_round"] - sum(named)
    return [
        str(one["per_token"]),
        f"{over['median']:.2f} ({over['low']:.2f}–{over['high']:.2f})",
        f"{one['tokens_a_round']:.2f}",
        *(f"{1e3 * x:.1f}" for x in (one["seconds_a_round"], *named, between)),
        *(f"{1e3 * one[name]:.1f}" for name in ("cpu_a_token", "draft_cpu_a_token")),
    ]


def _bars(found: dict[str, Found]) -> list[Bar]:
    def median(name: str, other: str) -> float | None:
        if name not in found or other not in found:
            return None
        return statistics.median(found[name].times(found[other]))

    bars = [
        Bar("a draft replica, × plain", median(REPLICA, PLAIN), 1.8),
        Bar("a draft replica, × taking turns", median(REPLICA, TURNS), 1.15),
    ]
    failing = (*LATE, WRONG, HUNG, DEAD)
    return bars + [Bar(f"{name}, × plain", median(name, PLAIN), 0.97) for name in failing]


if __name__ == "__main__":
    typer.run(main)
