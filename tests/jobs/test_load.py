"""What is asked of servers: answers, their times and counts, rates, and what goes wrong."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from jobs.load import Answer, Client, at_rate, highest, quantile, side_by_side
from linearized.errors import ClusterError


class Repeating:
    """Answers each prompt with its own words."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.at_a_time = self.most = 0

    def app(self) -> FastAPI:
        app = FastAPI()
        app.post("/v1/completions", response_model=None)(self.complete)
        return app

    async def complete(self, request: Request):
        body = await request.json()
        self.bodies.append(body)
        if body["prompt"] == "refused":
            return JSONResponse({"error": {"message": "too busy"}}, 503)
        self.at_a_time += 1
        self.most = max(self.most, self.at_a_time)
        await asyncio.sleep(0)
        return StreamingResponse(self.words(body["prompt"].split()), media_type="text/event-stream")

    async def words(self, words):
        for index, word in enumerate(words):
            await asyncio.sleep(0)
            if word == "broken":
                yield 'data: {"error": {"message": "lost"}}\n\n'
                break
            if word == "silent":
                break
            end = "length" if index == len(words) - 1 else None
            yield chunk(choices=[{"text": word, "finish_reason": end}])
        else:
            details = {"cached_tokens": 3}
            yield chunk(
                choices=[],
                usage={
                    "completion_tokens": len(words), "prompt_tokens": 7,
                    "prompt_tokens_details": details,
                },
            )  # fmt: skip
            yield "data: [DONE]\n\n"
        self.at_a_time -= 1


def chunk(**body) -> str:
    return f"data: {json.dumps(body)}\n\n"


@pytest.fixture
def server() -> Repeating:
    return Repeating()


@pytest.fixture
async def client(server):
    transport = httpx.ASGITransport(app=server.app())
    async with Client("http://test", "m", {"top_k": 1}, transport=transport) as client:
        yield client


async def test_an_answer_is_what_the_server_says(server, client):
    heard: list[int] = []
    answer = await client.ask("to be or", 9, heard=heard.append, seed=5)
    assert (answer.text, answer.tokens, answer.error) == ("tobeor", 3, "")
    assert (answer.prompt_tokens, answer.cached_tokens) == (7, 3)
    assert heard == [1, 2, 3]
    assert len(answer.chunks) == 3 and len(answer.pauses) == 2
    assert sorted([answer.asked, *answer.chunks]) == [answer.asked, *answer.chunks]
    asked = {"model": "m", "prompt": "to be or", "max_tokens": 9, "seed": 5, "top_k": 1}
    assert asked.items() <= server.bodies[0].items()


def test_times_of_an_answer():
    answer = Answer(asked=10.0, chunks=(10.5, 11.0, 12.5), tokens=5)
    assert answer.first == 0.5 and answer.pauses == [0.5, 1.5]
    assert answer.per_token == 0.5  # the first token is not among those four


@pytest.mark.parametrize(
    "prompt,error",
    [
        ("refused", "status 503.*too busy"),
        ("to broken", "lost"),
        ("to silent", "ended early"),
    ],
)
async def test_what_goes_wrong_is_said(client, prompt, error):
    with pytest.raises(ClusterError, match=error):
        await client.ask(prompt, 9)
    found = await at_rate(client, ["to be", prompt], 1e6, tokens=9)
    assert [bool(answer.error) for answer in found] == [False, True]


async def test_streams_go_on_side_by_side(server, client):
    found, seconds = await side_by_side(client, [f"a b {i}" for i in range(7)], streams=3, tokens=9)
    assert sorted(answer.text for answer in found) == [f"ab{i}" for i in range(7)]
    assert server.most == 3 and seconds > 0


@pytest.mark.parametrize("able", [0.3, 1.0, 5.0, 9.9])
async def test_the_highest_rate_lies_just_below_what_passes(able):
    async def passes(rate: float) -> bool:
        return rate <= able

    assert able - 0.1 < await highest(passes, 10.0, probes=7) <= able


async def test_no_rate_passes():
    async def never(rate: float) -> bool:
        return False

    assert await highest(never, 2.0, probes=4) == 0.0


def test_quantiles():
    values = [float(value) for value in range(1, 101)]
    assert quantile(values, 0.99) == 99 and quantile(values, 0.5) == 50
    assert quantile([3.0], 0.99) == 3.0 and quantile([1.0, 2.0], 0.0) == 1.0
