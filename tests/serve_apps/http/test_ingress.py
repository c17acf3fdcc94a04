"""The HTTP side, with a target that is made up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import threading

import pytest

from serve_apps.generation import Delta, Refused
from serve_apps.http import bodies, requests
from serve_apps.http.streams import TargetLost
from serve_apps.http.tokens import Tokenizer
from serve_apps.logs import JsonLines

SCOPE = {
    "type": "http", "method": "POST", "path": "/v1/completions", "headers": [],
    "query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": "",
    "asgi": {"version": "3.0"}, "server": ("test", 80), "client": ("test", 1),
}  # fmt: skip


def receiving(body):
    """A client that sends this and stays."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await asyncio.sleep(60)

    return receive


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
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 1,
            "rejected_prediction_tokens": 2,
            "verification_rounds": 2,
            "drafted_by_depth": [2, 1],
            "accepted_by_depth": [1, 0],
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
    assert body["usage"]["total_tokens"] == 8


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
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4


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
        assert response.headers["x-request-id"] == response.json()["request_id"]
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
    assert number == response.headers["x-request-id"] == response.json()["request_id"]
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

    request = asyncio.create_task(app(SCOPE, receive, send))
    await asyncio.sleep(0.2)
    assert target.ended == 0
    left.set()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait_for(request, 20)
    assert target.ended == 1


async def test_models_and_health(client, target):
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list" and listed["data"][0]["id"] == "m"
    for path in ("/health", "/live", "/v1/models"):
        response = await client.head(path)
        assert (
            response.status_code == 200 and "application/json" in response.headers["content-type"]
        )
    assert (await client.get("/v1/models/m")).json() == listed["data"][0]
    assert (await client.get("/health")).json() == {"status": "ok", "draft": "none"}
    target.fails = RuntimeError("no replica")
    response = await client.get("/health")
    assert response.status_code == 503 and response.json()["error"]["code"] == "not_ready"
    assert (await client.get("/live")).status_code == 200


async def test_the_schema_is_published(client):
    schema = (await client.get("/openapi.json")).json()
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]
    assert "speculate" in body["content"]["application/json"]["schema"]["properties"]


async def test_a_chat(client, target):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "so kind"}]
    body = {"model": "m", "messages": messages, "seed": 1}
    whole = (await client.post("/v1/chat/completions", json=body)).json()
    assert whole["object"] == "chat.completion" and whole["id"].startswith("chatcmpl-")
    (choice,) = whole["choices"]
    said = " system: be user: so kind assistant:!"
    assert choice["message"] == {"role": "assistant", "content": said, "refusal": None}
    assert target.jobs[0].max_tokens + len(target.jobs[0].prompt) == 2000
    response = await client.post(
        "/v1/chat/completions",
        json={**body, "stream": True, "n": 2, "stream_options": {"include_usage": True}},
    )
    *chunks, done = events(response)
    assert done == "[DONE]"
    *chunks, last = [json.loads(chunk) for chunk in chunks]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:2]] == ["assistant"] * 2
    texts = ["", ""]
    for chunk in chunks:
        (one,) = chunk["choices"]
        assert "role" not in one["delta"] or one["delta"]["content"] == ""
        texts[one["index"]] += one["delta"].get("content", "")
    assert texts == [said] * 2
    assert last["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert last["usage"]["completion_tokens"] == 2 * whole["usage"]["completion_tokens"]


async def test_a_chat_that_cannot_be(target, asking, folder, client):
    body = {"model": "m", "messages": [{"role": "user", "content": "refused"}]}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "not this one" in response.json()["error"]["message"]
    async with asking(path=folder) as plain:
        response = await plain.post("/v1/chat/completions", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == "messages"
    assert "no chat template" in response.json()["error"]["message"]
    assert target.jobs == []


async def test_tokenize_and_detokenize(client, tokenizer):
    ids = tokenizer("größe")["input_ids"]
    body = (await client.post("/tokenize", json={"prompt": "größe"})).json()
    assert body == {"count": len(ids), "max_model_len": 2000, "tokens": ids}
    body = (await client.post("/detokenize", json={"tokens": [*ids, 0]})).json()
    assert body == {"prompt": "größe<|endoftext|>"}
    messages = [{"role": "user", "content": "a"}]
    body = (await client.post("/tokenize", json={"model": "m", "messages": messages})).json()
    assert body["tokens"] == tokenizer("user: a\nassistant:")["input_ids"]
    assert (await client.post("/tokenize", json={})).status_code == 400
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_log_probabilities_of_prompt_and_text(client, tokenizer):
    response = await post(client, prompt="a bé", echo=True, logprobs=1)
    (choice,) = response.json()["choices"]
    found = choice["logprobs"]
    assert choice["text"] == "a bé a bé!"
    ids = [*tokenizer("a bé")["input_ids"], *tokenizer(" a")["input_ids"]]
    ids += tokenizer(" bé")["input_ids"]
    assert len(found["tokens"]) == len(ids)
    assert found["token_logprobs"] == [None] + [-0.5] * (len(ids) - 1)
    assert found["top_logprobs"][0] is None
    assert found["top_logprobs"][1] == {found["tokens"][1]: -0.5}
    known = [(token, at) for token, at in zip(found["tokens"], found["text_offset"], strict=True)
             if not token.startswith("bytes:")]  # fmt: skip
    assert known and all(choice["text"][at:].startswith(token) for token, at in known)


async def test_an_error_of_a_text_ends_its_answer(client, target):
    target.error = "the model gave NaN logits"
    response = await post(client)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the model gave NaN logits"
    *_, last = events(await post(client, stream=True))
    assert json.loads(last)["error"]["code"] == "generation_failed"


async def test_a_target_that_is_lost(client, target):
    target.raises = TargetLost("replica 3 died")
    response = await post(client, prompt="fail")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "target_lost"
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("prompt", ["a b", ["a", "b"]])
async def test_nothing_of_a_stream_waits_for_a_clock(client, target, monkeypatch, prompt):
    """ray#59681: chunks are collected for some tens of milliseconds before they are passed on. Here
    the event loop's clock stands still, so whatever waited for it would wait for good; and the
    target says no word before the one before it is out."""
    out = asyncio.Queue()

    class Waiting(type(target)):
        async def complete(self, job):
            async for event in super().complete(job):
                yield event
                if isinstance(event, Delta) and event.tokens:
                    await out.get()

    target.__class__ = Waiting
    app = client._transport.app
    body = json.dumps({"model": "m", "prompt": prompt, "stream": True}).encode()
    said = []

    async def send(message):
        said.append(message.get("body", b""))
        for _ in range(said[-1].count(b'"text":" ')):
            out.put_nowait(None)

    loop = asyncio.get_running_loop()
    asking = asyncio.create_task(app(SCOPE, receiving(body), send))
    now = loop.time()
    monkeypatch.setattr(loop, "time", lambda: now)
    while not asking.done():
        await asyncio.sleep(0)
    assert said[-2:] == [b"data: [DONE]\n\n", b""]


@pytest.mark.parametrize("prompt", ["a b", ["a", "b"]])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_has_its_time(target, asking, stream, prompt):
    target.pause = 60
    async with asking(request_s=0.2) as client:
        response = await post(client, stream=stream, prompt=prompt)
    assert response.status_code == (200 if stream else 504)
    *_, last = events(response) if stream else [response.text]
    assert json.loads(last)["error"]["code"] == "deadline_exceeded"
    assert target.ended == len(target.jobs)


async def test_a_body_has_its_time(asking):
    async def never():
        yield b"{"
        await asyncio.sleep(60)

    async with asking(body_s=0.1) as client:
        response = await client.post("/v1/completions", content=never())
    assert response.status_code == 408
    assert response.json()["error"]["code"] == "request_timeout"


async def test_a_client_that_takes_nothing_is_left(target, asking):
    async with asking(send_s=0.1) as client:
        app = client._transport.app

        async def send(message):
            if message["type"] == "http.response.body":
                await asyncio.sleep(60)

        body = json.dumps({"model": "m", "prompt": "a b", "stream": True}).encode()
        await asyncio.wait_for(app(SCOPE, receiving(body), send), 20)
        assert target.ended == 1


async def test_whoever_names_requests_names_answers(client, caplog):
    caplog.set_level(logging.INFO)
    headers = {"x-request-id": "mine-1"}
    response = await client.get("/nowhere", headers=headers)
    assert response.json()["request_id"] == "mine-1" and "x-request-id" not in response.headers
    response = await client.get("/nowhere", headers={"x-request-id": "a b"})
    assert response.json()["request_id"].startswith("req-")


async def test_large_bodies_are_parsed_in_a_thread(asking, monkeypatch):
    """vllm#49239: others wait while a large body is looked at."""
    threads = []

    def watch(work):
        def watched(*given, **options):
            threads.append(threading.get_ident())
            return work(*given, **options)

        return watched

    monkeypatch.setattr(bodies, "parse", watch(bodies.parse))
    monkeypatch.setattr(requests, "validate", watch(requests.validate))
    async with asking() as client:
        for size in (10, bodies.LARGE):
            response = await post(client, user="x" * size)
            assert response.status_code == 200
    here = threading.get_ident()
    assert [thread == here for thread in threads] == [True, True, False, False]


async def test_a_prompt_of_too_many_tokens_goes_to_no_target(asking, target):
    """Few characters can be many tokens: only then is it known that they do not fit."""
    async with asking() as client:
        for path, body in {
            "/v1/completions": {"model": "m", "prompt": "\u4e2d" * 1000},
            "/v1/chat/completions": {
                "model": "m",
                "messages": [{"role": "user", "content": "\u4e2d" * 1000}],
            },
        }.items():
            error = (await client.post(path, json=body)).json()["error"]
            assert error["code"] == "context_length_exceeded" and "30" in error["message"]
            assert error["param"] == list(body)[1]
    assert target.jobs == []


@pytest.mark.parametrize("stream", [False, True])
async def test_many_log_probabilities_are_written_beside_the_event_loop(
    asking, stream, tokenizer, monkeypatch
):
    """They take seconds, in which nobody else would get a word."""
    threads = set()
    name = Tokenizer._name

    def named(self, token):
        threads.add(threading.current_thread())
        return name(self, token)

    monkeypatch.setattr(Tokenizer, "_name", named)
    async with asking() as client:
        prompt = [token % len(tokenizer) for token in range(1500)]
        asked = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 0}
        response = await post(client, **asked, stream=stream)
    assert response.status_code == 200 and threading.current_thread() not in threads and threads
    found = json.loads(events(response)[0]) if stream else response.json()
    (choice,) = found["choices"]
    assert len(choice["logprobs"]["top_logprobs"]) >= 1500
    assert choice["text"].startswith(tokenizer.decode(prompt, skip_special_tokens=True))


async def test_a_prompt_that_cannot_fit_is_not_tokenized(asking, monkeypatch):
    """vllm#24910: a prompt of megabytes keeps the tokenizer from all others."""
    async with asking() as client:
        monkeypatch.setattr(Tokenizer, "_ids", lambda *given, **how: pytest.fail("tokenized"))
        text = "x" * 40_000
        for path, body in {
            "/v1/completions": {"model": "m", "prompt": text},
            "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": text}]},
            "/tokenize": {"prompt": text},
        }.items():
            response = await client.post(path, json=body)
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_line_breaks_of_unicode_are_escaped_in_events(client):
    """dify#39008: clients that split lines by Unicode's rules lose events."""
    text = "a\u2028b\u2029c\u0085d"
    response = await post(client, prompt=text, stream=True, echo=True)
    for line in response.text.splitlines():
        assert not line or line.startswith("data: ")
    first = json.loads(events(response)[0])
    assert first["choices"][0]["text"] == text


@pytest.mark.parametrize("stream", [False, True])
async def test_each_request_is_a_line_of_the_log(client, tokenizer, caplog, stream):
    caplog.set_level(logging.INFO)
    headers = {"x-request-id": "mine-2"}
    body = {"model": "m", "prompt": "secret words", "stream": stream, "user": "secret name"}
    await client.post("/v1/completions", json=body, headers=headers)
    await client.get("/health")
    (line,) = [r for r in caplog.records if r.name.startswith("serve_apps")]
    seconds = line.fields.pop("seconds")
    assert seconds >= 0 and line.fields == {
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "key": None,
        "stream": stream,
        "texts": 1,
        "prompt_tokens": len(tokenizer("secret words")["input_ids"]),
        "cached_tokens": 1,
        "completion_tokens": sum(
            len(tokenizer(f" {word}")["input_ids"]) for word in ("secret", "words")
        ),
        "rounds": 2,
    }
    assert "secret" not in JsonLines().format(line)


async def test_lines_of_the_log_say_what_went_wrong(client, target, caplog):
    caplog.set_level(logging.INFO)
    await post(client, model="x")
    target.raises = TargetLost("replica 3 died")
    await post(client, prompt="fail", stream=True)
    fields = [r.fields for r in caplog.records if r.getMessage() == "request"]
    assert [(one["status"], one.get("code")) for one in fields] == [
        (404, "model_not_found"), (200, "target_lost")
    ]  # fmt: skip


async def test_what_is_logged_in_a_request_bears_its_name(client, target, caplog):
    caplog.set_level(logging.INFO)
    names = []
    handler = logging.Handler()
    handler.emit = lambda record: names.append(json.loads(JsonLines().format(record)))
    logger = logging.getLogger("serve_apps.http.guard")
    logger.addHandler(handler)
    try:
        target.raises = TargetLost("replica 3 died")
        for number in "ab":
            body = {"model": "m", "prompt": "a fail", "stream": True}
            headers = {"x-request-id": f"mine-{number}"}
            await client.post("/v1/completions", json=body, headers=headers)
    finally:
        logger.removeHandler(handler)
    assert [one["request_id"] for one in names] == ["mine-a"] * 2 + ["mine-b"] * 2
    assert json.loads(JsonLines().format(caplog.records[-1])).get("request_id") is None


async def test_rounds_are_told_to_who_asks(client, target, tokenizer):
    options = {"stream": True, "prompt": "a béd", "stream_options": {"include_rounds": True}}
    target.drafts = True
    *chunks, _ = events(await post(client, **options))
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    first, *others = choices
    assert first["prompt"] == {"tokens": len(tokenizer("a béd")["input_ids"]), "cached_tokens": 1}
    assert first["text"] == "" and "round" not in first
    rounds = [one["round"] for one in others if "round" in one]
    assert len(rounds) == 2
    text, marks = "".join(one["text"] for one in choices), []
    for found in rounds:
        marks += [(token["offset"], token["drafted"]) for token in found["tokens"]]
        tree = found["tree"]
        assert tree["parents"] == [-1, *range(len(tree["tokens"]) - 1)]
        assert tree["accepted"] == list(range(len(found["tokens"]) - 1))
    assert text == " a béd!"
    assert marks[0][0] == 0 and marks == sorted(marks, key=lambda mark: mark[0])
    assert [drafted for _, drafted in marks][-1] is False and any(drafted for _, drafted in marks)
    assert all("usage" not in json.loads(chunk) for chunk in chunks)


async def test_nobody_is_told_of_rounds_who_did_not_ask(client, target):
    target.drafts = True
    response = await post(client, stream=True)
    assert "round" not in response.text and "cached_tokens" not in response.text
    assert not target.jobs[0].trees
    wrong = await post(client, stream_options={"include_rounds": True})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "stream_options"


async def test_the_page_of_a_model_says_what_it_needs(client, target, asking, folder):
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert model["chat"] and model["max_model_len"] == 2000
    assert (model["state_bytes"], model["cache_token_bytes"]) == (100, 7)
    target.fails = RuntimeError("no replica")
    async with asking(path=folder) as plain:
        (model,) = (await plain.get("/v1/models")).json()["data"]
    assert not model["chat"] and "state_bytes" not in model


async def test_the_playground_needs_nothing_from_outside(client):
    response = await client.get("/")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert (await client.head("/")).status_code == 200
    assert not re.findall(
        r"(?:https?:)?//[\w.]+/", response.text.replace("www.w3.org/2000/svg", "")
    )
    assert " style=" not in response.text and " onclick=" not in response.text
