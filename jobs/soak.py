"""Many requests of all kinds, and what is left of them: memory, file descriptors, tasks, texts.

    python -m jobs.soak --target runs/mine/target --draft runs/mine/draft --requests 10000

Runs ingress, targets and a draft as processes of their own (see `jobs.fleet`). Some requests are
whole, some streams, some are wrong, some clients leave, and some texts are known and must be the
same again. Ends with one line of JSON, and with status 1 if something has grown or was left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from jobs import measure
from jobs.faults import left_behind
from jobs.fleet import Fleet
from jobs.measure import Machine, last_line, show
from jobs.streams import ASKED, Streams

SAMPLES = 20
"""Times that processes are asked for what they hold."""
WARM = 0.4
"""Part of the requests after which nothing grows any more."""
GROWTH = 0.05
"""Of memory, that is still called flat."""
SLACK_FDS, SLACK_TASKS = 2, 2
"""More at the end than when it was warm: what a sample falls upon."""
KINDS = ("ingress", "target", "draft")
PREFIX_BYTES = 8 * 2**20
"""What targets keep of prompts: little, so that it is full soon."""


@dataclass
class Soak:
    requests: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    samples: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """By process, over time."""
    left: list[str] = field(default_factory=list)

    def warm(self, name: str) -> list[dict[str, float]]:
        samples = self.samples[name]
        return samples[int(WARM * len(samples)) :]

    def growth(self, name: str) -> float:
        """Of memory, from the first third of the warm samples to the last third."""
        found = [sample["rss"] for sample in self.warm(name)]
        part = max(1, len(found) // 3)
        return statistics.median(found[-part:]) / statistics.median(found[:part]) - 1

    def problems(self) -> list[str]:
        found = [*self.wrong[:3], *self.left]
        for name in self.samples:
            if abs(self.growth(name)) > GROWTH:
                found.append(f"{name}: memory changes by {self.growth(name):+.1%}")
            first, last = self.warm(name)[0], self.samples[name][-1]
            for what, slack in (("fds", SLACK_FDS), ("tasks", SLACK_TASKS)):
                if last[what] > first[what] + slack:
                    found.append(f"{name}: {first[what]:.0f} {what}, then {last[what]:.0f}")
        return found


async def soak(
    target: Path, draft: Path | None, *, requests: int, at_a_time: int, seed: int = 0
) -> Soak:
    settings = {"target": {"prefix_bytes": PREFIX_BYTES}}
    async with Fleet(target, draft, settings=settings) as fleet:
        streams = Streams(fleet.url, target.name, tokens=24)
        try:
            await streams.learn()
            return await _soak(fleet, streams, requests, at_a_time, seed)
        finally:
            await streams.close()


async def _soak(fleet: Fleet, streams: Streams, requests: int, at_a_time: int, seed: int) -> Soak:
    it = Soak(requests=requests)
    numbers = iter(range(requests))
    began = time.perf_counter()

    async def client() -> None:
        for number in numbers:
            draw = random.Random(seed * requests + number)
            it.outcomes[await _one(streams, draw, it.wrong)] += 1

    for part in itertools.count(1):
        # Samples are taken between requests: what is there then is nobody's.
        numbers = iter(range((part - 1) * requests // SAMPLES, part * requests // SAMPLES))
        await asyncio.gather(*(client() for _ in range(at_a_time)))
        it.left += await left_behind(fleet)
        for kind in KINDS:
            for number, held in enumerate(await fleet.held(kind)):
                it.samples.setdefault(f"{kind} {number}", []).append(held)
        if part == SAMPLES:
            break
    it.seconds = time.perf_counter() - began
    return it


async def _one(streams: Streams, draw: random.Random, wrong: list[str]) -> str:
    """What became of a request of some kind."""
    kind = draw.choices(("known", "new", "refused", "leaves"), (4, 10, 2, 2))[0]
    if kind == "known":
        name = draw.choice(list(ASKED))
        heard = await streams.ask(name)
        if heard.told is None:
            return heard.error
        if heard.told != streams.calm[name].told:
            wrong.append(f"{name}: {heard.told} instead of {streams.calm[name].told}")
        return "the same text"
    body: dict[str, Any] = {
        **streams.body("greedy"),
        "prompt": " ".join(str(draw.randrange(10**6)) for _ in range(draw.randrange(1, 12))),
        "max_tokens": draw.choice([0, 1, 2, 8, 16]),
        "temperature": draw.choice([0, 1.0]),
    }
    if kind == "refused":
        body |= draw.choice([{"n": 0}, {"colour": 1}, {"prompt": []}, {"max_tokens": 10**9}])
    if kind == "leaves":
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(draw.uniform(0.0, 0.2)):
                await streams.client.post("/v1/completions", json={**body, "max_tokens": 1000})
        return "left"
    answer = await streams.client.post("/v1/completions", json=body)
    good = answer.status_code == 400 if kind == "refused" else "[DONE]" in answer.text
    if not good:
        wrong.append(f"{body}: {answer.text[-500:]}")
    return kind


def main(
    target: Annotated[Path, typer.Option(help="Folder of the model.")],
    draft: Annotated[Path | None, typer.Option(help="Folder of the draft model.")] = None,
    requests: Annotated[int, typer.Option(help="In all.")] = 10_000,
    at_a_time: Annotated[int, typer.Option(help="Clients side by side.")] = 16,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
) -> None:
    """Ask and ask, and look what stays."""
    console = measure.console()
    machine = Machine.measure(torch.device("cpu"), torch.float32)
    console.print(str(machine))
    it = asyncio.run(soak(target, draft, requests=requests, at_a_time=at_a_time, seed=seed))
    columns = ["process", "MB warm", "MB at the end", "growth", "fds", "tasks", "longest stall ms"]
    rows = []
    for name, samples in it.samples.items():
        first, last = it.warm(name)[0], samples[-1]
        rows.append(
            [
                name,
                f"{first['rss'] / 1e6:.1f}",
                f"{last['rss'] / 1e6:.1f}",
                f"{it.growth(name):+.2%}",
                f"{first['fds']:.0f} → {last['fds']:.0f}",
                f"{first['tasks']:.0f} → {last['tasks']:.0f}",
                f"{1e3 * max(one['stall'] for one in samples):.0f}",
            ]
        )
    title = f"{requests} requests, {at_a_time} at a time, in {it.seconds:.0f} s"
    show(title, columns, rows, console)
    console.print(", ".join(f"{count} {what}" for what, count in it.outcomes.most_common()))
    problems = it.problems()
    config = {
        "target": str(target), "draft": str(draft or ""), "requests": requests,
        "at_a_time": at_a_time, "seed": seed,
    }  # fmt: skip
    growth = {name: it.growth(name) for name in it.samples}
    results = {"seconds": it.seconds, "outcomes": dict(it.outcomes), "growth": growth}
    print(last_line("soak", machine, config=config, results=results, problems=problems))
    if problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
