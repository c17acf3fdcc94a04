"""The app through its door, beside the engine alone: tokens a second, first token, time between
tokens, the link's round trip, and the gap in a stream whose target is killed.

    python -m jobs.bench_serve --target runs/mine/target --draft runs/mine/draft
    python -m jobs.bench_serve --target runs/mine/target --url http://127.0.0.1:8000 --model other

Starts the app on a cluster of its own, as users start it; or, with `--url`, asks a server that runs
already, whosever it is, if it has OpenAI's completions. Prompts are random token ids. Ends with one
line of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import torch
import typer

import linearized
from cluster.local import LocalCluster
from jobs import measure
from jobs.measure import Machine, last_line, show
from linearized.errors import ClusterError
from linearized.speculative import Engine, NgramDrafter, Sampling, Text

ROOT = Path(__file__).parents[1]
START_S = 600.0
KILLS = 5


def main(
    target: Annotated[Path, typer.Option(help="Folder of the model.")],
    draft: Annotated[Path | None, typer.Option(help="Folder of the draft model.")] = None,
    url: Annotated[str, typer.Option(help="A server that runs already.")] = "",
    model: Annotated[str, typer.Option(help="Its model's name.")] = "",
    streams: Annotated[str, typer.Option(help="Numbers of streams, with commas.")] = "1,4,8",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 256,
    tokens: Annotated[int, typer.Option(help="New tokens of a text.")] = 64,
    turns: Annotated[int, typer.Option(help="Texts of each stream.")] = 3,
    speculate: Annotated[str, typer.Option(help="model, ngram, none; empty: not said.")] = "none",
    settings: Annotated[str, typer.Option(help="More of the app's, as `key=value …`.")] = "",
    kills: Annotated[int, typer.Option(help="Targets to kill in mid-stream.")] = KILLS,
) -> None:
    """Measure a server."""
    try:
        sizes = [int(size) for size in streams.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"streams must be numbers with commas, got {streams!r}") from error
    console = measure.console()
    machine = Machine.measure(torch.device("cpu"), torch.float32)
    console.print(str(machine))
    vocabulary = json.loads((target / "config.json").read_text())["vocab_size"]
    load = _Load(model or target.name, vocabulary, prompt, tokens, turns, speculate)
    results: dict[str, Any] = {}
    if url:
        results["door"] = {size: asyncio.run(load.through(url, size)) for size in sizes}
    else:
        results["round_trip"] = _round_trip()
        results["engine"] = {size: _alone(target, load, size) for size in sizes}
        extra = [f"draft={draft}"] if draft is not None else []
        with _app(target, [*extra, *settings.split()]) as (own, _):
            results["door"] = {size: asyncio.run(load.through(own, size)) for size in sizes}
        if kills:
            two = [*settings.split(), "target_replicas=2", "target_cpus=0.9"]
            with _app(target, two) as (own, folder):
                results["gaps"] = [_gap(own, folder, load) for _ in range(kills)]
    rows = [
        [where, str(size), *(f"{value:,.1f}" for value in _in_columns(found))]
        for where in ("engine", "door")
        for size, found in results.get(where, {}).items()
    ]
    columns = ["where", "streams", "tokens/s", "first p50 ms", "p99", "between p50 ms", "p99"]
    show(f"{prompt} tokens of prompt, {tokens} new ones", columns, rows, console)
    for name, one in results.get("round_trip", {}).items():
        console.print(f"link, {name}: p50 {1e3 * one['p50']:.2f} ms, p99 {1e3 * one['p99']:.2f} ms")
    if results.get("gaps"):
        gaps = sorted(results["gaps"])
        middle = statistics.median(gaps)
        console.print(f"a killed target: gaps of {middle:.2f} s p50, {gaps[-1]:.2f} s at most")
    config = {
        "target": str(target), "draft": str(draft or ""), "url": url, "prompt": prompt,
        "tokens": tokens, "turns": turns, "speculate": speculate, "settings": settings,
    }  # fmt: skip
    print(last_line("bench_serve", machine, config=config, results=results))


class _Load:
    """What is asked for, of whatever server."""

    def __init__(
        self, model: str, vocabulary: int, prompt: int, tokens: int, turns: int, speculate: str
    ) -> None:
        self.model, self.vocabulary, self.tokens = model, vocabulary, tokens
        self.prompt, self.turns, self.speculate = prompt, turns, speculate

    def ids(self, seed: int) -> list[int]:
        draw = random.Random(seed)
        return [draw.randrange(self.vocabulary) for _ in range(self.prompt)]

    def body(self, seed: int, tokens: int) -> dict[str, Any]:
        body = {"model": self.model, "prompt": self.ids(seed), "max_tokens": tokens}
        ours = {"speculate": self.speculate} if self.speculate else {}
        return {**body, **ours, "temperature": 0, "stream": True}

    async def through(self, url: str, streams: int) -> dict[str, float]:
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            await self.times(client, 10**6, self.tokens)  # warm
            began = time.perf_counter()
            found = await asyncio.gather(
                *(self._several(client, 1000 * stream) for stream in range(streams))
            )
            seconds = time.perf_counter() - began
        return _summary([times for few in found for times in few], self.tokens, seconds)

    async def _several(self, client: httpx.AsyncClient, first: int) -> list[list[float]]:
        return [await self.times(client, first + turn, self.tokens) for turn in range(self.turns)]

    async def times(
        self,
        client: httpx.AsyncClient,
        seed: int,
        tokens: int,
        heard: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """When the request was sent, and when its chunks came."""
        times = [time.perf_counter()]
        body = self.body(seed, tokens)
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                raise ClusterError(f"the server answers {response.status_code}: {response.text}")
            async for line in response.aiter_lines():
                if "error" in line[:20]:
                    raise ClusterError(f"the stream ends with {line}")
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
                    heard()
        return times


def _summary(found: list[list[float]], tokens: int, seconds: float) -> dict[str, float]:
    firsts = [times[1] - times[0] for times in found]
    between = [pause for times in found for pause in _pauses(times)]
    return {
        "tokens_per_s": len(found) * tokens / seconds,
        "first_p50": _quantile(firsts, 0.5),
        "first_p99": _quantile(firsts, 0.99),
        "between_p50": _quantile(between, 0.5),
        "between_p99": _quantile(between, 0.99),
    }


def _pauses(times: list[float]) -> list[float]:
    """Between the chunks of one stream."""
    return [later - earlier for earlier, later in itertools.pairwise(times[1:])]


def _in_columns(found: dict[str, float]) -> list[float]:
    speed, *times = found.values()
    return [speed, *(1e3 * seconds for seconds in times)]


def _quantile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def _alone(target: Path, load: _Load, streams: int) -> dict[str, float]:
    """The engine in this process, with one thread as a target replica has it."""
    torch.set_num_threads(1)
    model = linearized.load(target)
    linearized.pack(model)
    drafters = [] if load.speculate == "none" else [NgramDrafter()]
    engine = Engine(model, drafters=drafters, rows=16)
    engine.measure()
    found: list[list[float]] = []
    began = time.perf_counter()
    for turn in range(load.turns):
        times: dict[Text, list[float]] = {}
        for stream in range(streams):
            prompt = load.ids(1000 * stream + turn)
            text = Text(prompt, sampling=Sampling(), max_new_tokens=load.tokens)
            times[text] = [time.perf_counter()]
            engine.add(text)
        while engine.busy:
            for text, _ in engine.step():
                times[text].append(time.perf_counter())
        found += times.values()
    return _summary(found, load.tokens, time.perf_counter() - began)


def _round_trip() -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "serve_apps.link.round_trip"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextlib.contextmanager
def _app(target: Path, settings: list[str]) -> Iterator[tuple[str, Path]]:
    """The app on a cluster of its own: its URL, and the cluster's folder."""
    with LocalCluster(num_cpus=max(2, os.cpu_count() or 1)) as cluster:
        env = {**os.environ, **cluster.env}
        serve = [sys.executable, "-m", "ray.serve.scripts"]
        start = ["start", "--http-host", "127.0.0.1", "--http-port", str(cluster.http_port)]
        app = ["run", "--non-blocking", "serve_apps.app:build", f"target={target}", *settings]
        for command in (start, app):
            done = subprocess.run(
                [*serve, *command], env=env, cwd=ROOT, capture_output=True, text=True
            )
            if done.returncode:
                raise ClusterError(f"the app did not start: {done.stderr.strip()[-500:]}")
        url = f"http://127.0.0.1:{cluster.http_port}"
        _wait(lambda: httpx.get(f"{url}/health").status_code == 200)
        yield url, cluster.temp


def _gap(url: str, folder: Path, load: _Load) -> float:
    """The longest pause of a stream whose target is killed. Both may go on with it: the one that
    works most is killed."""
    _wait(lambda: len(_targets(folder)) == 2)
    time.sleep(3.0)  # until the ingress knows both

    async def run() -> list[float]:
        count = 0
        before = {process: sum(process.cpu_times()[:2]) for process in _targets(folder)}

        def heard() -> None:
            nonlocal count
            count += 1
            if count == 64:
                max(before, key=lambda one: sum(one.cpu_times()[:2]) - before[one]).kill()

        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            return await load.times(client, 77, 256, heard)

    times = asyncio.run(run())
    return max(_pauses(times))


def _targets(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ServeReplica" in (name := " ".join(process.info["cmdline"] or [])) and (
            ":target" in name and (parent := process.parent()) is not None
        ):
            found += [process] * (str(folder) in " ".join(parent.cmdline()))
    return found


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if condition():
                return
        time.sleep(0.3)
    raise ClusterError(f"the app was not healthy within {START_S:.0f} s")


if __name__ == "__main__":
    typer.run(main)
