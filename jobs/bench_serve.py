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
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from jobs import measure, serving
from jobs.measure import Bar, Machine, Timing, last_line, show, show_bars
from jobs.servers import Server, llama_server, ours, transformers_serve
from jobs.serving import FIRST_S, SHARED, Asked, Corpus
from linearized.errors import LinearizedError

PARTS = ("one", "many", "prefix", "rate", "draft", "killed")
"""Those that share an app stand side by side."""
RIVAL = "transformers serve"
LONG = 8192
"""Tokens of the prompt that is seen twice."""
Results = dict[str, Any]


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

    extra = [f"compile={str(compile).lower()}", *settings.split()]
    results: Results = {}
    if {"one", "many", "prefix", "rate"} & set(chosen):
        with ours(run / "target", [f"target_cpus={threads}", "ingress_cpus=0", *extra]) as server:
            if "one" in chosen:
                pack = "pack=false" not in extra
                engine = serving.engine_of(
                    run / "target", threads=threads, pack=pack, compile=compile
                )
                results["one"] = {
                    "round_trip": serving.round_trip(),
                    **asyncio.run(serving.one_stream(asked, server, engine)),
                }
                _show_one(results["one"], console)
            if "many" in chosen:
                with _others(run, threads, sizes, tokens, llama, gguf, console) as others:
                    results["many"] = _many(asked, sizes, [server, *others], console)
            if "prefix" in chosen:
                load = replace(asked, prompt=long)
                results["prefix"] = asyncio.run(serving.seen_before(load, server))
                _show_prefix(results["prefix"], console)
            if "rate" in chosen:
                load = replace(asked, prompt=prompt, tokens=new)
                results["rate"] = asyncio.run(serving.at_highest_rate(load, server, requests))
                _show_rate(results["rate"], request, console)
    if "draft" in chosen and not (run / "draft").exists():
        console.print("not there, and not measured: draft")
    elif "draft" in chosen:
        with ours(run / "target", [f"draft={run / 'draft'}", *extra]) as server:
            results["draft"] = asyncio.run(serving.drafted(asked, server))
            _show_draft(results["draft"], console)
    if "killed" in chosen:
        two = ["target_replicas=2", f"target_cpus={(threads - 0.1) / 2}", *extra]
        with ours(run / "target", two) as server:
            load = replace(asked, tokens=4 * tokens)
            results["killed"] = asyncio.run(serving.killed(load, server, kills))
            _show_killed(results["killed"], console)
    bars = _bars(results)
    show_bars(bars, console)
    config = {
        "run": str(run), "parts": chosen, "loads": loads, "tokens": tokens, "texts": texts,
        "turns": turns, "kills": kills, "requests": requests, "request": request,
        "threads": threads, "compile": compile, "settings": settings, "quick": quick,
    }  # fmt: skip
    print(last_line("bench_serve", machine, config=config, results=results, bars=bars))


def _pair(text: str) -> tuple[int, int]:
    """
    Raises:
        ValueError: it is no two numbers.
    """
    first, x, second = text.partition("x")
    if x and first.isdecimal() and second.isdecimal() and int(first) and int(second):
        return int(first), int(second)
    raise ValueError(f"two numbers with an x between them are needed, such as 8x256, got {text!r}")


def _many(
    asked: Asked, sizes: list[tuple[int, int]], servers: list[Server], console: Console
) -> Results:
    found = {}
    for streams, length in sizes:
        name, load = f"{streams} x {length}", replace(asked, prompt=length)
        found[name] = asyncio.run(serving.many_streams(load, servers, streams))
        _show_many(name, found[name], asked.tokens, console)
    return found


@contextlib.contextmanager
def _others(
    run: Path,
    threads: int,
    sizes: list[tuple[int, int]],
    tokens: int,
    llama: Path | None,
    gguf: Path | None,
    console: Console,
) -> Iterator[list[Server]]:
    """Servers beside ours, all of which run and wait for their turns."""
    with contextlib.ExitStack() as stack:
        found = []
        streams = max(streams for streams, _ in sizes)
        context = max(length for _, length in sizes) + tokens + 64
        if (run / "teacher").exists():
            twin = transformers_serve(run / "teacher", threads, streams=streams, context=context)
            found.append(stack.enter_context(twin))
        else:
            console.print("not there, and not measured: teacher, the softmax twin")
        if llama is not None and gguf is not None:
            other = llama_server(llama, gguf, threads, streams=streams, context=context)
            found.append(stack.enter_context(other))
        yield found


def _bars(results: Results) -> list[Bar]:
    one, draft = results.get("one"), results.get("draft")
    prefix, killed, rate = results.get("prefix"), results.get("killed"), results.get("rate")
    bars = [
        Bar("one stream: time of a token, door / engine", _over(one, "token"), 1.15, least=False),
        Bar("one stream: first token, door − engine, ms", _later(one), 10, least=False),
        Bar("link: round trip p50, ms", _ms(one and one["round_trip"]["unix"]["p50"]), 0.3, False),
        Bar(
            "one stream, drafts in a replica / plain, tokens/s",
            draft and draft["none"]["token"].median / draft["model"]["token"].median,
            1.8,
        ),
    ]
    for name, found in results.get("many", {"8 x 256": {}, "4 x 4096": {}}).items():
        mine, theirs = found.get("ours"), found.get(RIVAL)
        both = mine is not None and theirs is not None
        speed = theirs["token"].median / mine["token"].median if both else None
        pause = mine["between_p99"] / theirs["between_p99"] if both else None
        bars += [
            Bar(f"{name}: tokens/s, ours / {RIVAL}", speed, 2),
            Bar(f"{name}: between tokens p99, ours / {RIVAL}", pause, 1, least=False),
        ]
    return [
        *bars,
        Bar(
            "a prompt seen before: first token / the first time",
            prefix and prefix["seen"].median / prefix["new"].median,
            0.1,
            least=False,
        ),
        Bar("a shared prefix: tokens not read again", prefix and prefix["shared"], SHARED),
        Bar("a killed target: gap p99, s", killed and killed["gap_p99"], 2, least=False),
        Bar("a killed target: other texts", killed and killed["differing"], 0, least=False),
        Bar("highest rate: errors", rate and rate["errors"], 0, least=False),
        Bar("highest rate: first token p99, s", rate and rate["first_p99"], FIRST_S, least=False),
    ]


def _over(one: Results | None, what: str) -> float | None:
    return one and one["ours"][what].median / one["engine"][what].median


def _later(one: Results | None) -> float | None:
    return _ms(one and one["ours"]["first"].median - one["engine"]["first"].median)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _show_one(found: Results, console: Console) -> None:
    rows = [
        [name, str(found[name]["token"]), str(found[name]["first"])] for name in ("engine", "ours")
    ]
    show("One stream, no drafts", ["", "time of a token (quartiles)", "first token"], rows, console)
    for kind, trip in found["round_trip"].items():
        p50, p99 = (f"{1e3 * trip[part]:.2f} ms" for part in ("p50", "p99"))
        console.print(f"round trip over the link, {kind}: p50 {p50}, p99 {p99}")


def _show_draft(found: Results, console: Console) -> None:
    rows = [[name, str(times["token"]), str(times["first"])] for name, times in found.items()]
    title = "One stream, a draft in a replica of its own, one thread a side"
    show(title, ["drafts", "time of a token (quartiles)", "first token"], rows, console)


def _show_many(load: str, found: Results, tokens: int, console: Console) -> None:
    rows = [
        [
            name,
            f"{_rate(one['token'])} ({1 / one['token'].high:,.1f}–{1 / one['token'].low:,.1f})",
            str(one["first"]),
            f"{1e3 * one['between_p50']:,.1f} ms",
            f"{1e3 * one['between_p99']:,.1f} ms",
        ]
        for name, one in found.items()
    ]
    columns = ["", "tokens/s (quartiles)", "first token", "between p50", "p99"]
    show(f"{load} tokens of prompt, {tokens} new ones", columns, rows, console)


def _rate(token: Timing) -> str:
    return f"{1 / token.median:,.1f}"


def _show_prefix(found: Results, console: Console) -> None:
    rows = [["the first time", str(found["new"])], ["the second time", str(found["seen"])]]
    show(f"First token of a prompt of {found['tokens']:,} tokens", ["", "time"], rows, console)
    console.print(f"a prefix of {SHARED} tokens, third prompt: {found['shared']} not read again")


def _show_killed(found: Results, console: Console) -> None:
    console.print(
        f"{len(found['gaps'])} killed targets: longest pauses of {found['gap_p50']:.2f} s p50, "
        f"{found['gap_p99']:.2f} s p99; {found['differing']} texts other than in a calm run"
    )


def _show_rate(found: Results, request: str, console: Console) -> None:
    console.print(
        f"{found['requests']} requests of {request} tokens at {found['rate']:.2f} a second: first "
        f"token p99 {found['first_p99']:.2f} s, {found['errors']} errors "
        f"{'; '.join(found['reasons'])}"
    )


if __name__ == "__main__":
    typer.run(main)
