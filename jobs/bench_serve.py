"""The app through its door against what it should reach: beside the engine alone, with drafts,
beside other servers, with prompts that were seen before, with targets that are killed, and with as
many requests as it can take.

    python -m jobs.pair bench                     # once: trains what is measured
    python -m jobs.bench_serve                    # on a machine that does nothing else
    python -m jobs.bench_serve --parts one,many
    python -m jobs.bench_serve --run runs/demo --quick    # for a look, not for figures

| part | what is measured |
|---|---|
| one | a text at a time, without drafts: the engine in this process, and the door |
| draft | a text at a time through the door: with a draft in a replica of its own, and without |
| many | several texts at a time: ours, `transformers serve` on the teacher, and others if given |
| prefix | a long prompt the first time and the second; a short prefix that prompts share |
| killed | the longest pause of a stream whose target is killed, with a second one there |
| rate | as many requests a second as begin in time |

Starts each server itself, on loopback, and ends it. Servers have as many threads in total as
`--threads` says, and take turns with the same prompts. Ends with one line of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from jobs import measure, serving
from jobs import serving_report as report
from jobs.measure import Machine, last_line, show_bars
from jobs.servers import Server, llama_server, ours, transformers_serve
from jobs.serving import Asked, Corpus
from jobs.serving_report import Results
from linearized.errors import LinearizedError

ALONE, WITH_DRAFT, TWO = "one target", "a target and a draft", "two targets"
PARTS = {
    "one": ALONE, "many": ALONE, "prefix": ALONE, "rate": ALONE, "draft": WITH_DRAFT, "killed": TWO,
}  # fmt: skip
"""With the app that each of them needs."""
LONG = 8192
"""Tokens of the prompt that is seen twice."""
Rival = Callable[[], contextlib.AbstractContextManager[Server]]
"""Starts a server, and ends it."""


def main(
    run: Annotated[Path, typer.Option(help="A folder with target, draft, teacher, data.")] = Path(
        "runs/bench"
    ),
    parts: Annotated[str, typer.Option(help="Which, with commas between.")] = ",".join(PARTS),
    loads: Annotated[
        str, typer.Option(help="Of `many`: streams x tokens of a prompt, with commas between.")
    ] = "8x256,4x4096",
    tokens: Annotated[int, typer.Option(min=2, help="New tokens of a text.")] = 64,
    texts: Annotated[int, typer.Option(min=1, help="Of each stream in a turn of `many`.")] = 2,
    turns: Annotated[int, typer.Option(min=1, help="Of each that is compared.")] = 9,
    kills: Annotated[int, typer.Option(min=1, help="Targets to kill.")] = 10,
    requests: Annotated[int, typer.Option(min=1, help="Of `rate`.")] = 1000,
    request: Annotated[
        str, typer.Option(help="Of `rate`: tokens of a prompt x new tokens.")
    ] = "64x16",
    threads: Annotated[int, typer.Option(min=0, help="Of each server; 0: one a core.")] = 0,
    compile: Annotated[bool, typer.Option(help="Compile our steps.")] = False,
    settings: Annotated[str, typer.Option(help="More of the app's, as `key=value …`.")] = "",
    llama: Annotated[
        Path | None, typer.Option("--llama-server", help="llama.cpp's server, for `many`.")
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="The model for it.")] = None,
    quick: Annotated[bool, typer.Option(help="A few short texts.")] = False,
) -> None:
    """Measure the app, and those that people would start instead."""
    long = LONG
    if quick:
        loads, tokens, texts, turns, kills, requests = "2x16", 8, 1, 2, 1, 12
        request, long = "8x4", 64
    chosen = parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(
            f"there is no part {unknown.pop()!r}; choose from {', '.join(PARTS)}"
        )
    if (llama is None) != (gguf is None):
        raise typer.BadParameter("--llama-server and --gguf go together")
    threads = threads or os.cpu_count() or 1
    try:
        sizes = [_pair(load) for load in loads.split(",")]
        prompt, new = _pair(request)
        corpus = Corpus(run)
    except (ValueError, OSError, LinearizedError) as error:
        raise typer.BadParameter(str(error)) from error
    asked = Asked(corpus=corpus, prompt=sizes[0][1], tokens=tokens, texts=texts, turns=turns)
    console = measure.console()
    torch.set_num_threads(threads)
    machine = Machine.measure(torch.device("cpu"), torch.float32)
    console.print(str(machine))

    settings_ = [f"compile={str(compile).lower()}", *settings.split()]
    parts_ = _Parts(
        run=run, asked=asked, threads=threads, settings=settings_, loads=sizes, kills=kills,
        rate=replace(asked, prompt=prompt, tokens=new), requests=requests,
        long=replace(asked, prompt=long), rivals=_rivals(run, threads, sizes, tokens, llama, gguf),
        console=console,
    )  # fmt: skip
    names = [name for name in PARTS if name in chosen]
    if "draft" in names and not (run / "draft").exists():
        names.remove("draft")
        console.print("not there, and not measured: draft")
    if "many" in names and not (run / "teacher").exists():
        console.print("not there, and not measured: teacher, the softmax twin")
    results, failed = parts_.measure(names)
    bars = report.bars(results)
    show_bars(bars, console)
    config = {
        "run": str(run), "parts": chosen, "loads": loads, "tokens": tokens, "texts": texts,
        "turns": turns, "kills": kills, "requests": requests, "request": request,
        "threads": threads, "compile": compile, "settings": settings, "quick": quick,
    }  # fmt: skip
    print(
        last_line("bench_serve", machine, config=config, results=results, failed=failed, bars=bars)
    )
    if failed:
        raise typer.Exit(1)


class _Parts:
    """Measures parts one after the other, and shows each as soon as it is known."""

    def __init__(
        self,
        *,
        run: Path,
        asked: Asked,
        threads: int,
        settings: list[str],
        loads: list[tuple[int, int]],
        rate: Asked,
        requests: int,
        long: Asked,
        kills: int,
        rivals: list[Rival],
        console: Console,
    ) -> None:
        self._run, self._asked, self._threads, self._settings = run, asked, threads, settings
        self._loads, self._rate_asked, self._requests, self._long = loads, rate, requests, long
        self._kills, self._rivals, self._console = kills, rivals, console

    def measure(self, names: list[str]) -> tuple[Results, dict[str, str]]:
        """What was measured, by part; and why the others could not be."""
        results: Results = {}
        failed: dict[str, str] = {}
        for kind, group in itertools.groupby(names, PARTS.__getitem__):
            some = list(group)
            try:
                with ours(self._run / "target", self._app(kind)) as server:
                    while some:
                        with self._reporting(some[0], failed):
                            results[some[0]] = getattr(self, f"_{some[0]}")(server)
                        some.pop(0)
            except LinearizedError as error:  # the app itself: none of them
                for name in some:
                    failed[name] = str(error)
                    self._console.print(f"{name} could not be measured: {error}")
        return results, failed

    @contextlib.contextmanager
    def _reporting(self, name: str, failed: dict[str, str]) -> Iterator[None]:
        """One part that fails does not spoil the others, which may have taken long."""
        try:
            yield
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            self._console.print(f"{name} could not be measured: {failed[name]}")

    def _app(self, kind: str) -> list[str]:
        """Settings with which an app fills the threads."""
        threads = self._threads
        own = {
            ALONE: [f"target_cpus={threads}", "ingress_cpus=0"],
            WITH_DRAFT: [f"draft={self._run / 'draft'}"],
            TWO: ["target_replicas=2", f"target_cpus={(threads - 0.1) / 2}"],
        }
        return [*own[kind], *self._settings]

    def _one(self, server: Server) -> Results:
        engine = serving.engine_of(
            self._run / "target",
            threads=self._threads,
            pack="pack=false" not in self._settings,
            compile="compile=true" in self._settings,
        )
        found = {
            "round_trip": serving.round_trip(),
            **asyncio.run(serving.one_stream(self._asked, server, engine)),
        }
        report.show_one(found, self._console)
        return found

    def _many(self, server: Server) -> Results:
        found = {}
        with contextlib.ExitStack() as stack:
            servers = [server, *(stack.enter_context(start()) for start in self._rivals)]
            for streams, length in self._loads:
                name, load = f"{streams} x {length}", replace(self._asked, prompt=length)
                found[name] = asyncio.run(serving.many_streams(load, servers, streams))
                report.show_many(name, found[name], load.tokens, self._console)
        return found

    def _prefix(self, server: Server) -> Results:
        found = asyncio.run(serving.seen_before(self._long, server))
        report.show_prefix(found, self._console)
        return found

    def _rate(self, server: Server) -> Results:
        found = asyncio.run(serving.at_highest_rate(self._rate_asked, server, self._requests))
        report.show_rate(found, self._rate_asked, self._console)
        return found

    def _draft(self, server: Server) -> Results:
        found = asyncio.run(serving.drafted(self._asked, server))
        report.show_draft(found, self._console)
        return found

    def _killed(self, server: Server) -> Results:
        load = replace(self._asked, tokens=2 * self._asked.tokens)
        found = asyncio.run(serving.killed(load, server, self._kills))
        report.show_killed(found, self._console)
        return found


def _pair(text: str) -> tuple[int, int]:
    """
    Raises:
        ValueError: it is no two numbers.
    """
    first, x, second = text.partition("x")
    if x and first.isdecimal() and second.isdecimal() and int(first) and int(second):
        return int(first), int(second)
    raise ValueError(f"two numbers with an x between them are needed, such as 8x256, got {text!r}")


def _rivals(
    run: Path,
    threads: int,
    sizes: list[tuple[int, int]],
    tokens: int,
    llama: Path | None,
    gguf: Path | None,
) -> list[Rival]:
    """What starts the servers beside ours."""
    streams = max(streams for streams, _ in sizes)
    context = max(length for _, length in sizes) + tokens + 64
    size = {"streams": streams, "context": context}
    found: list[Rival] = []
    if (run / "teacher").exists():
        found.append(partial(transformers_serve, run / "teacher", threads, **size))
    if llama is not None and gguf is not None:
        found.append(partial(llama_server, llama, gguf, threads, **size))
    return found


if __name__ == "__main__":
    typer.run(main)
