"""The HTTP side, with a target that is made up."""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx
import pytest

from serve_apps.generation import Delta, Description, Finished, Refused, Started
from serve_apps.http.ingress import IngressConfig, http_app


class Echoing:
    """Answers each prompt with its own words, one a round."""

    def __init__(self) -> None:
        self.jobs = []
        self.ended = 0
        self.fails: Exception | None = None
        self.refuses: Refused | None = None
        self.breaks = ""
        self.pause = 0.0

    async def ready(self):
        if self.fails is not None:
            raise self.fails
        return Description(fingerprint="fp", vocab_size=10, draft="none")

    async def complete(self, job):
        self.jobs.append(job)
        try:
            if self.refuses is not None:
                yield self.refuses
                return
            if job.prompt == self.breaks:
                raise ValueError("cannot start")
            yield Started(prompt_tokens=3, prompt_text=job.prompt if job.echo else "")
            words = str(job.prompt).split()
            for word in words:
                await asyncio.sleep(self.pause)
                if word == "fail":
                    raise ValueError("secret detail")
                yield Delta(text=f" {word}", tokens=(1,))
            yield Delta(text="!", tokens=())
            yield Finished(
                reason="length",
                completion_tokens=len(words),
                accepted=1,
                rejected=2,
                rounds=len(words),
            )
        finally:
            self.ended += 1


@pytest.fixture
def target():
    return Echoing()


@pytest.fixture
async def client(target):
    app = http_app(target, IngressConfig(model="m", max_body=10_000))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def post(client, **values):
    return await client.post("/v1/completions", json={"model": "m", "prompt": "a b", **values})


def events(response):
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


async def test_a_completion(client, target):
    response = await post(client, seed=5)
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert (body["model"], body["system_fingerprint"], body["seed"]) == ("m", "fp", 5)
    assert body["choices"] == [
        {"index": 0, "text": " a b!", "logprobs": None, "finish_reason": "length"}
    ]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "completion_tokens_details": {
            "accepted_prediction_tokens": 1,
            "rejected_prediction_tokens": 2,
            "verification_rounds": 2,
        },
    }
    assert target.ended == 1


async def test_without_a_seed_one_is_drawn_and_named(client, target):
    seeds = {(await post(client)).json()["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert {job.sampling.seed for job in target.jobs} == seeds


async def test_each_prompt_is_a_choice(client):
    body = (await post(client, prompt=["a", "b c"], echo=True)).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "a a!"), (1, "b c b c!")]
    assert body["usage"]["total_tokens"] == 9


async def test_a_stream(client):
    response = await post(client, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response)
    assert done == "[DONE]"
    chunks = [json.loads(chunk) for chunk in chunks]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " a b!"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, None, "length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_a_stream_with_usage_and_two_prompts(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await post(client, prompt=["a", "b c"], echo=True, **options)
    *chunks, _ = events(response)
    *chunks, last = [json.loads(chunk) for chunk in chunks]
    texts = ["", ""]
    for chunk in chunks:
        assert chunk["usage"] is None
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["a a!", "b c b c!"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3


async def test_errors_have_openais_shape(client, target):
    cases = [
        (await post(client, model="x"), 404, "model", "model_not_found"),
        (await post(client, max_tokens=-1), 400, "max_tokens", "invalid_value"),
        (await client.post("/v1/completions", content=b"{"), 400, None, "invalid_json"),
        (await client.get("/v1/completions"), 405, None, "method_not_allowed"),
        (await client.get("/nowhere"), 404, None, "not_found"),
        (await client.get("/v1/models/x"), 404, "model", "model_not_found"),
        (await post(client, prompt="x" * 20_000), 413, None, "request_too_large"),
        (await client.post("/v1/completions", content=slowly()), 413, None, "request_too_large"),
    ]
    for response, status, param, code in cases:
        error = response.json()["error"]
        assert response.status_code == status
        assert (error["param"], error["code"]) == (param, code)
        assert error["type"] == "invalid_request_error" and error["message"]
    assert cases[3][0].headers["allow"] == "POST"
    assert target.jobs == []


async def slowly():
    """A body that does not say how long it is."""
    for _ in range(100):
        yield b" " * 1000


@pytest.mark.parametrize("stream", [False, True])
async def test_overload(client, target, stream):
    target.refuses = Refused(status=503, message="busy", code="overloaded", retry_after=7)
    response = await post(client, prompt=["a", "b"], stream=stream)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "7"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "overloaded")
    assert target.ended == 2


async def test_an_internal_error_tells_nothing_but_its_number(client, caplog):
    response = await post(client, prompt="a fail")
    assert response.status_code == 500
    message = response.json()["error"]["message"]
    assert "secret" not in response.text and "Traceback" not in response.text
    number = message.split()[-1]
    (record,) = [r for r in caplog.records if number in r.getMessage()]
    assert record.exc_info and "secret detail" in str(record.exc_info[1])


async def test_one_prompt_that_cannot_start_ends_the_others(client, target):
    target.breaks = "b"
    response = await post(client, prompt=["a", "b", "c"], stream=True)
    assert response.status_code == 500
    assert target.ended == 3


async def test_an_internal_error_in_a_stream_is_its_last_event(client):
    response = await post(client, prompt="a fail b", stream=True)
    first, last = [json.loads(event) for event in events(response)]
    assert first["choices"][0]["text"] == " a"
    assert last["error"]["code"] == "internal" and "secret" not in response.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_text(client, target, stream):
    target.pause = 0.05
    app = client._transport.app
    left = asyncio.Event()
    body = json.dumps({"model": "m", "prompt": "w " * 1000, "stream": stream}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "headers": [],
        "query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": "",
        "asgi": {"version": "3.0"}, "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip
    request = asyncio.create_task(app(scope, receive, send))
    await asyncio.sleep(0.2)
    assert target.ended == 0
    left.set()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait_for(request, 20)
    assert target.ended == 1


async def test_models_and_health(client, target):
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list" and listed["data"][0]["id"] == "m"
    assert (await client.get("/v1/models/m")).json() == listed["data"][0]
    assert (await client.get("/health")).json() == {"status": "ok", "draft": "none"}
    target.fails = RuntimeError("no replica")
    response = await client.get("/health")
    assert response.status_code == 503 and response.json()["error"]["code"] == "not_ready"


async def test_the_schema_is_published(client):
    schema = (await client.get("/openapi.json")).json()
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]
    assert "speculate" in body["content"]["application/json"]["schema"]["properties"]
