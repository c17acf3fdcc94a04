"""What is asked of a server, and when its answers come. Knows OpenAI's completions and time; knows
nothing of who answers.

    async with Client(url, "target") as client:
        answers = await side_by_side(client, prompts, streams=8, tokens=64)
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from linearized.errors import ClusterError

ANSWER_S = 300.0
"""Seconds that an answer may be silent."""
Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed text. Times are of `time.perf_counter`."""

    asked: float
    """When the request was sent."""
    chunks: tuple[float, ...]
    """When the parts of the text came."""
    text: str = ""
    tokens: int = 0
    """That were generated, as the server counts them."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""
    """Why it is not whole; empty: it is."""

    @property
    def first(self) -> float:
        """Seconds from the request to the first part."""
        return self.chunks[0] - self.asked

    @property
    def pauses(self) -> list[float]:
        """Seconds between neighbouring parts."""
        return [later - earlier for earlier, later in itertools.pairwise(self.chunks)]

    @property
    def per_token(self) -> float:
        """Seconds a token, from the first part to the last."""
        return (self.chunks[-1] - self.chunks[0]) / max(self.tokens - 1, 1)


class Client:
    """Asks one model of one server."""

    def __init__(
        self,
        url: str,
        model: str,
        body: Mapping[str, Any] | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`body`: what every request has beside model, prompt and number of tokens."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(
            base_url=url, timeout=ANSWER_S, limits=limits, transport=transport
        )
        self._body = {"model": model, "temperature": 0, "stream": True, **(body or {})}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def try_(
        self,
        prompt: Prompt,
        tokens: int,
        *,
        heard: Callable[[int], None] = lambda count: None,
        **more: Any,
    ) -> Answer:
        """A text of so many tokens, greedily. `heard` is called with the number of parts after each
        of them. What goes wrong is in the answer's `error`."""
        body = {**self._body, "prompt": prompt, "max_tokens": tokens, **more}
        asked = time.perf_counter()
        chunks: list[float] = []
        parts: list[str] = []
        usage: dict[str, Any] = {}
        error = "the stream ended early"
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    return Answer(asked, (), error=_refusal(response))
                async for line in response.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        error = ""
                        continue
                    now, chunk = time.perf_counter(), json.loads(line[6:])
                    if "error" in chunk:
                        error = f"the stream ends with {chunk['error']}"
                        break
                    usage = chunk.get("usage") or usage
                    choices = chunk.get("choices") or [{}]
                    if text := choices[0].get("text"):
                        chunks.append(now)
                        parts.append(text)
                        heard(len(chunks))
                    if choices[0].get("finish_reason"):
                        error = ""  # not every server says [DONE]
        except httpx.HTTPError as problem:
            error = f"{type(problem).__name__}: {problem}"
        if not error and not chunks:
            error = "the text is empty"
        return Answer(
            asked,
            tuple(chunks),
            "".join(parts),
            usage.get("completion_tokens", tokens),
            usage.get("prompt_tokens", 0),
            (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            error,
        )

    async def ask(
        self,
        prompt: Prompt,
        tokens: int,
        *,
        heard: Callable[[int], None] = lambda count: None,
        **more: Any,
    ) -> Answer:
        """As `try_`.

        Raises:
            ClusterError: the text is not whole; says why.
        """
        answer = await self.try_(prompt, tokens, heard=heard, **more)
        if answer.error:
            raise ClusterError(f"the server does not answer: {answer.error}")
        return answer


def _refusal(response: httpx.Response) -> str:
    """Without the request's name, so that equal reasons are equal."""
    try:
        reason = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        reason = response.text[:200]
    return f"status {response.status_code}: {reason}"


async def side_by_side(
    client: Client, prompts: Sequence[Prompt], *, streams: int, tokens: int
) -> tuple[list[Answer], float]:
    """All of them, so many streams at a time, each of which asks for its next text when one has
    ended. Returns the answers, and the seconds that all of it took."""
    shares = [prompts[stream::streams] for stream in range(streams)]

    async def several(share: Sequence[Prompt]) -> list[Answer]:
        return [await client.ask(prompt, tokens) for prompt in share]

    began = time.perf_counter()
    found = await asyncio.gather(*map(several, shares))
    seconds = time.perf_counter() - began
    return [answer for some in found for answer in some], seconds


async def at_rate(
    client: Client, prompts: Sequence[Prompt], rate: float, *, tokens: int, seed: int = 0
) -> list[Answer]:
    """All of them, so many a second on average, at random times (a Poisson process), whether or not
    earlier ones have ended."""
    draw = random.Random(seed)

    async def later(prompt: Prompt, when: float) -> Answer:
        await asyncio.sleep(when)
        return await client.try_(prompt, tokens)

    whens = itertools.accumulate(draw.expovariate(rate) for _ in prompts)
    return await asyncio.gather(*map(later, prompts, whens))


async def highest(
    passes: Callable[[float], Awaitable[bool]], limit: float, *, probes: int
) -> float:
    """The highest rate below `limit` that is seen to pass, found by `probes` looks, each in the
    middle between what has passed and what has not. 0.0: none has."""
    low, high = 0.0, limit
    for _ in range(probes):
        rate = (low + high) / 2
        if await passes(rate):
            low = rate
        else:
            high = rate
    return low


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least this part of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(part * len(ordered)) - 1, 0)]
