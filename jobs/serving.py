"""What is measured of a server, part by part. Knows engines, servers and prompts; knows nothing of
bars, and nothing of what is printed.

Whoever is compared takes turns, with the same prompts: pieces of held-out text, a new one for each
text, so that no server has seen it.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import linearized
from jobs.load import Answer, Prompt, at_rate, highest, quantile, side_by_side
from jobs.measure import Timing
from jobs.servers import ROOT, Server, wait
from linearized.compiled import can_compile
from linearized.errors import DataError
from linearized.packing import can_pack
from linearized.speculative import Engine, Sampling, Text
from linearized.training.blocks import Blocks

FIRST_S = 2.0
"""Seconds within which 99 of 100 texts should begin, at the highest rate."""
SHARED = 16
"""Tokens of a short prefix that prompts share."""
LOOK_S = 1.0
SETTLE_S = 3.0
"""Seconds after which an ingress knows all targets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is asked for, of whatever server."""

    corpus: Corpus
    prompt: int
    """Tokens of a prompt."""
    tokens: int
    """New tokens of a text."""
    texts: int
    """Of each stream in a turn."""
    turns: int
    warm: int = 2
    """Turns before the first that counts."""


class Corpus:
    """Pieces of held-out text, each from another place."""

    def __init__(self, run: Path) -> None:
        """
        Raises:
            DataError: nothing is held out there.
        """
        blocks = Blocks(run / "data" / "held_out")
        self._tokens: list[int] = blocks.rows(range(len(blocks))).flatten().tolist()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(run / "target")
        self._places = random.Random(0)

    def ids(self, num_tokens: int) -> list[int]:
        """
        Raises:
            DataError: there are not so many.
        """
        if num_tokens >= len(self._tokens):
            raise DataError(
                f"{len(self._tokens)} tokens are held out, a prompt of {num_tokens} is asked for"
            )
        start = self._places.randrange(len(self._tokens) - num_tokens)
        return self._tokens[start : start + num_tokens]

    def texts(self, count: int, num_tokens: int) -> list[str]:
        """Of so many tokens, give or take what merges differently at the ends."""
        ids = [self.ids(num_tokens) for _ in range(count)]
        found: list[str] = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return found

    def read(self, text: str) -> list[int]:
        """Its token ids, as a server reads it."""
        found: list[int] = self._tokenizer(text)["input_ids"]
        return found


def engine_of(target: Path, *, threads: int, pack: bool, compile: bool) -> Engine:
    """The engine of a target replica, in this process."""
    torch.set_num_threads(threads)
    model = linearized.load(target)
    if pack and can_pack(model):
        linearized.pack(model)
    if compile and can_compile(model):
        linearized.compile(model)
    engine = Engine(model, rows=16)
    engine.measure()
    return engine


def round_trip() -> dict[str, dict[str, float]]:
    """Seconds over the link between two processes, by kind of socket."""
    command = [sys.executable, "-m", "serve_apps.link.round_trip"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


async def one_stream(asked: Asked, server: Server, engine: Engine) -> dict[str, dict[str, Timing]]:
    """One text at a time, without drafts: the engine in this process, and the server."""
    found: dict[str, list[Answer]] = {"engine": [], server.name: []}
    prompts = asked.corpus.texts(asked.warm + asked.turns, asked.prompt)
    async with server.client(speculate="none") as client:
        for turn, prompt in enumerate(prompts):
            for name in list(found)[:: 1 if turn % 2 else -1]:
                if name == "engine":
                    answer = _alone(engine, asked.corpus.read(prompt), asked.tokens)
                else:
                    answer = await client.ask(prompt, asked.tokens)
                found[name].append(answer)
    return {name: _times(answers[asked.warm :]) for name, answers in found.items()}


async def drafted(asked: Asked, server: Server) -> dict[str, dict[str, Timing]]:
    """One text at a time: without drafts, and with those of the server's draft replica."""
    found: dict[str, list[Answer]] = {"none": [], "model": []}
    prompts = asked.corpus.texts(asked.warm + asked.turns, asked.prompt)
    async with server.client() as client:
        for turn, prompt in enumerate(prompts):
            for kind in list(found)[:: 1 if turn % 2 else -1]:
                found[kind].append(await client.ask(prompt, asked.tokens, speculate=kind))
    return {kind: _times(answers[asked.warm :]) for kind, answers in found.items()}


async def many_streams(
    asked: Asked, servers: Sequence[Server], streams: int
) -> dict[str, dict[str, Any]]:
    """So many texts at a time, of each server: `token`, the seconds that a token of any of them
    took, over whole turns, prompts included; when texts began; what was between their parts."""
    seconds: dict[str, list[float]] = {server.name: [] for server in servers}
    answers: dict[str, list[Answer]] = {server.name: [] for server in servers}
    for turn in range(1 + asked.turns):
        texts = asked.texts if turn else 1  # the first turn is for warming up
        prompts = asked.corpus.texts(streams * texts, asked.prompt)
        first = turn % len(servers)
        for server in [*servers[first:], *servers[:first]]:
            async with server.client() as client:
                found, spent = await side_by_side(
                    client, prompts, streams=streams, tokens=asked.tokens
                )
            if turn:
                seconds[server.name].append(spent / sum(answer.tokens for answer in found))
                answers[server.name] += found
    return {
        name: {
            "token": Timing.of(seconds[name]),
            "first": Timing.of([answer.first for answer in found]),
            **_quantiles("between", [pause for answer in found for pause in answer.pauses]),
        }
        for name, found in answers.items()
    }


async def seen_before(asked: Asked, server: Server) -> dict[str, Any]:
    """The first token of a long prompt that nobody has seen, and of the same once more; and how
    many tokens of a short prefix are not read again when a third prompt begins with it."""
    new: list[float] = []
    seen: list[float] = []
    shared: list[int] = []
    async with server.client(speculate="none") as client:
        for _ in range(1 + asked.turns):
            (prompt,) = asked.corpus.texts(1, asked.prompt)
            new.append((await client.ask(prompt, 2)).first)
            seen.append((await client.ask(prompt, 2)).first)
            prefix = asked.corpus.ids(SHARED)
            for _ in range(3):
                answer = await client.ask(prefix + asked.corpus.ids(SHARED), 2)
            shared.append(answer.cached_tokens)
    return {
        "tokens": asked.prompt,
        "new": Timing.of(new[1:]),
        "seen": Timing.of(seen[1:]),
        "shared": min(shared),
    }


async def killed(asked: Asked, server: Server, kills: int) -> dict[str, Any]:
    """The longest pause of streams whose targets are killed, and whether each text is that of a
    calm run. Both replicas are there when it happens."""
    gaps: list[float] = []
    differing = 0
    for prompt in asked.corpus.texts(kills, asked.prompt):
        wait(lambda: _are_warm(server, 2), "the second target")
        time.sleep(SETTLE_S)
        async with server.client(speculate="none") as client:
            answer = await client.ask(
                prompt, asked.tokens, heard=_killer(server, asked.tokens // 4)
            )
            gaps.append(max(answer.pauses))
            differing += (await client.ask(prompt, asked.tokens)).text != answer.text
    return {"gaps": gaps, **_quantiles("gap", gaps), "differing": differing}


async def at_highest_rate(asked: Asked, server: Server, requests: int) -> dict[str, Any]:
    """So many requests at the highest rate at which 99 of 100 texts begin within FIRST_S seconds.
    It lies below what the server gets done, which is seen first: a few requests at a higher rate
    would just wait in line. It is looked for with a quarter as many requests at a time; still fewer
    would end before a line has grown."""
    few = max(requests // 4, 8)
    async with server.client() as client:
        streams = min(16, few)
        prompts = asked.corpus.texts(few, asked.prompt)
        _, seconds = await side_by_side(client, prompts, streams=streams, tokens=asked.tokens)

    async def ask(count: int, rate: float) -> list[Answer]:
        prompts: list[Prompt] = [*asked.corpus.texts(count, asked.prompt)]
        async with server.client() as client:
            return await at_rate(client, prompts, rate, tokens=asked.tokens)

    async def passes(rate: float) -> bool:
        answers = await ask(few, rate)
        return not any(a.error for a in answers) and _first_p99(answers) < FIRST_S

    rate = await highest(passes, few / seconds, probes=5)
    answers = await ask(requests, rate) if rate else []
    errors = [answer.error for answer in answers if answer.error]
    return {
        "requests": len(answers),
        "rate": rate,
        "first_p99": _first_p99(answers),
        "errors": len(errors),
        "reasons": sorted(set(errors))[:5],
    }


def _are_warm(server: Server, count: int) -> bool:
    """Are there so many targets, none of which works? One that gets warm does nothing else."""
    targets = server.targets()
    try:
        before = [_worked(process) for process in targets]
        time.sleep(LOOK_S)
        worked = [_worked(process) - then for process, then in zip(targets, before, strict=True)]
    except psutil.Error:  # one has ended
        return False
    return len(targets) == count and max(worked) < LOOK_S / 4


def _killer(server: Server, count: int) -> Callable[[int], None]:
    """To be called with the number of parts that have come of the one text there is. Kills the
    target that has it, which is the one that has worked most, when there are so many."""
    before = {process: _worked(process) for process in server.targets()}

    def heard(number: int) -> None:
        if number == count:
            max(before, key=lambda process: _worked(process) - before[process]).kill()

    return heard


def _alone(engine: Engine, prompt: list[int], tokens: int) -> Answer:
    text = Text(prompt, sampling=Sampling(), max_new_tokens=tokens)
    asked = time.perf_counter()
    chunks: list[float] = []
    engine.add(text)
    while engine.busy:
        if engine.step():
            chunks.append(time.perf_counter())
    return Answer(asked, tuple(chunks), tokens=len(text.tokens) - len(prompt))


def _times(answers: Sequence[Answer]) -> dict[str, Timing]:
    return {
        "token": Timing.of([answer.per_token for answer in answers]),
        "first": Timing.of([answer.first for answer in answers]),
    }


def _quantiles(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_p50": quantile(values, 0.5), f"{name}_p99": quantile(values, 0.99)}


def _first_p99(answers: Sequence[Answer]) -> float:
    firsts = [answer.first for answer in answers if answer.chunks]
    return quantile(firsts, 0.99) if firsts else 0.0


def _worked(process: psutil.Process) -> float:
    """Seconds of processor time."""
    times = process.cpu_times()
    return float(times.user + times.system)
