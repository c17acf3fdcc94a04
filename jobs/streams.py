"""Streams of a served model whose texts are known: what a client hears in calm is what it must hear
whatever else happens. Knows HTTP and OpenAI's completions; knows no server.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

PROMPT = "the quick brown fox"
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, plain": {"speculate": "none", "prompt": "def add(a, b):"},
    "seeded": {"temperature": 0.9, "seed": 7},
    "seeded, n = 2": {"temperature": 0.9, "seed": 8, "n": 2, "presence_penalty": 0.5},
    "seeded, whole": {"temperature": 1.1, "seed": 9, "top_p": 0.9, "stream": False},
    "guided": {"temperature": 0.9, "seed": 10, "guided": {"regex": "([a-z]{2,7} ){100}"}},
    "logprobs": {"logprobs": 2, "stop": ["never to be seen"], "prompt": "in the beginning"},
    "echo": {"echo": True, "logprobs": 1, "temperature": 0.8, "seed": 11, "speculate": "ngram"},
}
"""Eight that differ in all that can go wrong when a text goes on elsewhere."""


@dataclass(frozen=True)
class Told:
    """What an answer says in the end, however it was cut into chunks."""

    texts: tuple[str, ...]
    reasons: tuple[str | None, ...]
    tokens: tuple[tuple[str, ...], ...]
    """Those that log-probabilities name."""
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Heard:
    """What became of one request."""

    told: Told | None
    error: str = ""
    """The code that says why there is no answer, or `broken` if the connection was."""
    chunks: int = 0
    gap: float = 0.0
    """The longest time between two of its chunks."""


@dataclass
class Count:
    """How many requests ended how."""

    same: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    gap: float = 0.0

    def add(self, name: str, heard: Heard, calm: Heard) -> None:
        if heard.told is None:
            self.errors[heard.error] += 1
            return
        self.gap = max(self.gap, heard.gap)
        if heard.told == calm.told:
            self.same += 1
        else:
            self.wrong.append(f"{name}: {heard.told} instead of {calm.told}")


class Streams:
    def __init__(
        self,
        url: str,
        model: str,
        *,
        tokens: int,
        asked: Mapping[str, dict[str, Any]] | None = None,
        timeout: float = 120.0,
    ) -> None:
        """`asked`: the requests' own parameters, by name; by default ASKED."""
        self._asked = dict(ASKED if asked is None else asked)
        self._common = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
        # Each request has a connection of its own: one that has died is nobody else's.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.client = httpx.AsyncClient(
            base_url=url, timeout=timeout, limits=limits, trust_env=False
        )
        self.calm: dict[str, Heard] = {}
        """What is right."""

    async def close(self) -> None:
        await self.client.aclose()

    async def learn(self) -> int:
        """Ask for each text alone, in calm. Returns the number of chunks of all."""
        for name in self._asked:
            self.calm[name] = heard = await self.ask(name)
            assert heard.told is not None, f"{name}: {heard.error}"
        return sum(heard.chunks for heard in self.calm.values())

    async def all(
        self,
        strike: Callable[[], Awaitable[None]] | None = None,
        *,
        at: int = 0,
        times: int = 1,
    ) -> Count:
        """All of them side by side. `strike` runs once `at` chunks have come of them together."""
        chunks = itertools.count(1)
        due = asyncio.Event()

        def on_chunk() -> None:
            if next(chunks) >= at:
                due.set()

        names = list(self._asked) * times
        asking = [asyncio.create_task(self.ask(name, on_chunk)) for name in names]
        if strike is not None:
            ended: asyncio.Future[Any] = asyncio.gather(*asking)
            waiting: asyncio.Future[Any] = asyncio.create_task(due.wait())
            await asyncio.wait([ended, waiting], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            await strike()
        count = Count()
        for name, heard in zip(names, await asyncio.gather(*asking), strict=True):
            count.add(name, heard, self.calm[name])
        return count

    def body(self, name: str) -> dict[str, Any]:
        body = {**self._common, "stream": True, **self._asked[name]}
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        return body

    async def ask(self, name: str, on_chunk: Callable[[], None] = lambda: None) -> Heard:
        body = self.body(name)
        times: list[float] = []
        chunks: list[dict[str, Any]] = []
        try:
            async with self.client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200 or not body["stream"]:
                    answer = json.loads(await response.aread())
                    return _whole(response.status_code, answer)
                async for line in response.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        return Heard(_told(chunks), "", len(chunks), _longest(times))
                    chunks.append(json.loads(line.removeprefix("data: ")))
                    if "error" in chunks[-1]:
                        return Heard(None, chunks[-1]["error"]["code"])
                    times.append(time.perf_counter())
                    on_chunk()
        except httpx.TimeoutException:
            return Heard(None, "silent")
        except (httpx.TransportError, ValueError, KeyError):  # of a proxy whose app is gone
            return Heard(None, "broken")
        return Heard(None, "without an end")


def _whole(status: int, answer: dict[str, Any]) -> Heard:
    if status == 200:
        return Heard(_told([answer]), "", 1)
    return Heard(None, answer["error"]["code"])


def _told(chunks: list[dict[str, Any]]) -> Told:
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    tokens: dict[int, list[str]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        index = choice["index"]
        texts[index] = texts.get(index, "") + choice["text"]
        reasons[index] = choice["finish_reason"]
        tokens.setdefault(index, []).extend((choice["logprobs"] or {}).get("tokens", []))
    usage = chunks[-1]["usage"]
    order = sorted(texts)
    return Told(
        texts=tuple(texts[i] for i in order),
        reasons=tuple(reasons[i] for i in order),
        tokens=tuple(tuple(tokens[i]) for i in order),
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
    )


def _longest(times: list[float]) -> float:
    return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)
