"""OpenAI's own client, the app and a real, tiny model; and what users of other servers complained
about."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import openai
import pytest

from serve_apps.http.answers import LEAST

MODES = ("ngram", "none")
PROMPT = "the quick brown fox"
OK = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 24}


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture
def post(served):
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield lambda path="/v1/completions", **values: client.post(path, json={**OK, **values})


def chunks(response) -> list[dict]:
    *found, last = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    assert last == "[DONE]"
    return [json.loads(one) for one in found]


def chat(client, **values):
    messages = [{"role": "user", "content": PROMPT}]
    options = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 24}
    return client.chat.completions.create(**{**options, **values})


def test_completions(client):
    whole = client.completions.create(**OK)
    assert whole.usage.completion_tokens == 24 and whole.choices[0].finish_reason == "length"
    stream = client.completions.create(**OK, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    ids = client.completions.create(**{**OK, "prompt": [1, 2, 3]})
    assert ids.usage.prompt_tokens == 3
    several = client.completions.create(**{**OK, "prompt": [PROMPT, "def"]}, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == whole.choices[0].text


def test_chats(client):
    whole = chat(client, logprobs=True, top_logprobs=2)
    (choice,) = whole.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert len(choice.logprobs.content) == 24
    spelt = bytes(byte for one in choice.logprobs.content for byte in one.bytes)
    assert spelt.decode(errors="replace") == choice.message.content
    for one in choice.logprobs.content:
        assert one.top_logprobs[0].logprob == one.logprob > LEAST  # the text is greedy
    stream = list(chat(client, logprobs=True, top_logprobs=2, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    found = [
        one
        for chunk in stream
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert text == choice.message.content
    assert [one.token for one in found] == [one.token for one in choice.logprobs.content]
    assert chat(client, max_completion_tokens=5, max_tokens=None).usage.completion_tokens == 5


async def test_the_asynchronous_client(served):
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x") as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        whole = await client.completions.create(**OK)
        stream = await client.completions.create(**OK, stream=True)
        assert "".join([one.choices[0].text async for one in stream]) == whole.choices[0].text
        async with client.chat.completions.stream(
            model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=5, seed=1
        ) as events:
            kinds = [event.type async for event in events]
        assert "content.delta" in kinds and "content.done" in kinds


def test_errors(client):
    with pytest.raises(openai.BadRequestError, match="colour") as caught:
        client.completions.create(**OK, extra_body={"colour": 1})
    assert caught.value.param == "colour" and caught.value.code == "unknown_parameter"
    assert caught.value.request_id == caught.value.response.headers["x-request-id"]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**OK, "model": "x"})
    with pytest.raises(openai.BadRequestError, match="4096 tokens"):
        client.completions.create(**{**OK, "max_tokens": 5000})


def test_chats_in_json(client):
    """vllm#55313: endless white space with status 200."""
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=200, temperature=1)
    choice = answer.choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    assert " " * 17 not in choice.message.content and choice.message.content.startswith("{")


def test_logprobs_of_a_prompt(client):
    """What lm-eval's local-completions asks for."""
    answer = client.completions.create(**{**OK, "max_tokens": 0}, echo=True, logprobs=2)
    found = answer.choices[0].logprobs
    assert found.token_logprobs[0] is None and all(x < 0 for x in found.token_logprobs[1:])
    assert len(found.tokens) == answer.usage.prompt_tokens > 1
    assert "".join(found.tokens) == OK["prompt"] == answer.choices[0].text


def test_penalties_and_biases_reach_the_model(client):
    plain = client.completions.create(**OK).choices[0].text
    values = {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"logit_bias": {"83": 100}}
    for one in values:
        changed = client.completions.create(**OK, **one).choices[0].text
        assert changed != plain
    only = client.completions.create(**OK, logit_bias={"83": 100}, logprobs=0)
    assert set(only.choices[0].logprobs.tokens) == {only.choices[0].logprobs.tokens[0]}


def test_logprobs_with_drafts_and_in_streams(post):
    """llama.cpp#27972: all of them are 0.0; mlx-lm#1630: dropped in streams."""
    answers = [post(speculate=mode, logprobs=3).json()["choices"][0] for mode in MODES]
    for mode in MODES:
        found: dict[str, list] = {}
        for chunk in chunks(post(speculate=mode, logprobs=3, stream=True)):
            for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
                found.setdefault(name, []).extend(values)
        answers.append({"logprobs": found})
    first = answers[0]["logprobs"]
    assert len(first["tokens"]) == 24 and len(set(first["token_logprobs"])) > 12
    for answer in answers[1:]:
        other = answer["logprobs"]
        assert (other["tokens"], other["text_offset"]) == (first["tokens"], first["text_offset"])
        assert other["token_logprobs"] == pytest.approx(first["token_logprobs"], abs=1e-3)
    for token, top in zip(first["tokens"], first["top_logprobs"], strict=True):
        assert token in top and max(top.values()) == top[token]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_a_stop_string_is_shown(post, mode):
    """vllm#57052: its text leaks, also where log-probabilities name tokens."""
    text = post().json()["choices"][0]["text"]
    for start, size in ((7, 5), (3, 1), (11, 7)):
        stop = text[start : start + size]
        kept = text[: text.index(stop)]
        whole = post(stop=stop, speculate=mode, logprobs=0).json()["choices"][0]
        assert (whole["text"], whole["finish_reason"]) == (kept, "stop")
        assert all(at < len(kept) for at in whole["logprobs"]["text_offset"])
        shown, named = "", []
        for chunk in chunks(post(stop=stop, speculate=mode, logprobs=0, stream=True)):
            (choice,) = chunk["choices"]
            shown += choice["text"]
            assert kept.startswith(shown)
            named += (choice["logprobs"] or {"tokens": []})["tokens"]
        assert shown == kept and named == whole["logprobs"]["tokens"]


@pytest.mark.parametrize("mode", MODES)
def test_characters_are_sent_whole(post, mode):
    """ferrox#124: a character that is split over tokens becomes U+FFFD."""
    ids = post("/tokenize", model=None, temperature=None, max_tokens=None, prompt="日本🙂").json()
    bias = {str(token): 30 for token in ids["tokens"]}
    for seed in range(3):
        options = {"logit_bias": bias, "temperature": 1.0, "seed": seed, "speculate": mode}
        whole = post(**options).json()["choices"][0]["text"]
        pieces = [c["choices"][0]["text"] for c in chunks(post(**options, stream=True))]
        assert "".join(pieces) == whole


@pytest.mark.parametrize("mode", MODES)
def test_a_text_that_is_cut_says_length(post, mode):
    """vllm#58228: another finish_reason where max_tokens has cut the text."""
    for size in (0, 1, 7):
        choices = post(max_tokens=size, n=2, speculate=mode).json()["choices"]
        assert [one["finish_reason"] for one in choices] == ["length"] * 2
        reasons = [
            chunk["choices"][0]["finish_reason"]
            for chunk in chunks(post(max_tokens=size, speculate=mode, stream=True))
        ]
        assert reasons[-1] == "length" and not any(reasons[:-1])


def test_a_stream_ends_with_a_reason_for_each_choice_and_done(post):
    """vllm#52852: a stream without finish_reason, or without [DONE]. (Errors: the next test.)"""
    found = chunks(post(stream=True, n=3, temperature=1.0, prompt=["a", "b"]))
    ends = [one["index"] for c in found for one in c["choices"] if one["finish_reason"]]
    assert sorted(ends) == list(range(6))


async def test_no_done_after_an_error(asking):
    """vllm#57082: [DONE] after an abort."""
    async with asking() as client:
        body = {"model": "m", "prompt": "a fail b", "stream": True}
        text = (await client.post("/v1/completions", json=body)).text
    assert '"error"' in text.strip().split("\n")[-1] and "[DONE]" not in text


def test_echo_ids_and_no_choices(post):
    """Rapid-MLX#461: echo ignored, ids of chunks change, n = 0 accepted."""
    assert post(echo=True).json()["choices"][0]["text"].startswith(PROMPT)
    found = chunks(post(echo=True, stream=True))
    assert found[0]["choices"][0]["text"] == PROMPT
    assert len({(one["id"], one["created"]) for one in found}) == 1
    ids = post("/tokenize", model=None, temperature=None, max_tokens=None).json()["tokens"]
    assert post(echo=True, prompt=ids).json()["choices"][0]["text"].startswith(PROMPT)
    response = post(n=0)
    assert response.status_code == 400 and response.json()["error"]["param"] == "n"


def test_no_parameter_is_dropped(post):
    """ik_llama.cpp#2321: unknown fields are dropped; spring-ai#5197: max_completion_tokens is
    ignored."""
    for name in ("max_completion_token", "top-p", "Temperature", "cache_prompt", "n_predict"):
        response = post(**{name: 1})
        assert response.status_code == 400 and response.json()["error"]["param"] == name
    body = post(max_tokens=None, max_completion_tokens=3).json()
    assert body["usage"]["completion_tokens"] == 3


def test_usage_comes_once_and_only_if_asked_for(post):
    """continue#13162: usage in every chunk breaks clients."""
    assert all("usage" not in one for one in chunks(post(stream=True)))
    *rest, last = chunks(post(stream=True, stream_options={"include_usage": True}))
    assert all(one["usage"] is None and one["choices"] for one in rest)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 24


def test_token_ids_and_numbers_of_texts_are_bounded(post):
    """vllm#51795: negative token ids are accepted; vllm#37952: a huge n blocks the server."""
    for wrong in ({"prompt": [5, -1]}, {"prompt": [10**9]}, {"n": 10**9}, {"n": 33}):
        response = post(**wrong)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == next(iter(wrong))


async def test_a_seed_holds_beside_texts_without_one(served):
    """vllm#51226: a seed is ignored if a neighbour in the batch has none."""
    seeded = {**OK, "temperature": 1.2, "seed": 4, "max_tokens": 48}
    free = {**OK, "temperature": 1.2, "max_tokens": 48}
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x") as client:
        alone = await client.completions.create(**seeded)
        beside = await asyncio.gather(
            *(client.completions.create(**one) for one in [free, seeded, free, seeded, free])
        )
    texts = [answer.choices[0].text for answer in beside]
    assert texts[1] == texts[3] == alone.choices[0].text
    assert len({*texts}) == 4


@pytest.mark.parametrize("mode", MODES)
def test_what_is_known_of_a_prompt_changes_no_text(post, mode):
    """vllm#53912: a prefix cache beside speculation corrupts texts; vllm#40696: some lengths are
    never found; vllm#55600: somebody else's state is."""
    stem = f"{mode} " + "jumps over the lazy dog " * 6
    prompts = [stem[:40], stem, stem[:40], stem + "and on", stem, stem[:20] + "!", stem[:20] + "?"]
    answers = [post(prompt=one, speculate=mode).json() for one in prompts]
    texts = [answer["choices"][0]["text"] for answer in answers]
    cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]
    assert texts[0] == texts[2] and texts[1] == texts[4] and len({*texts}) == 5
    assert all(cached[i] == answers[i]["usage"]["prompt_tokens"] - 1 for i in (2, 4))
    assert cached[3] > 0
    # A prompt whose own tokens are scored is read from its beginning: a cold run.
    for prompt, text in zip(prompts, texts, strict=True):
        cold = post(prompt=prompt, echo=True, logprobs=0, speculate="none").json()
        assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert cold["choices"][0]["text"] == prompt + text


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("name", ["README.md", "docs/serving.md"])
def test_the_lines_of_the_documentation_work(served, name):
    """Each `curl` of the page, as somebody would paste it."""
    page = (Path(__file__).parents[3] / name).read_text()
    lines = re.findall(r"^    (curl (?:.*\n(?=      ))*.*)$", page, re.MULTILINE)
    assert len(lines) == page.count("    curl ") >= 1
    for line in lines:
        here = line.replace("localhost:8000", served.url).replace('"target"', '"tiny"')
        done = subprocess.run(
            ["bash", "-c", here + " -sS --fail-with-body --noproxy '*'"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert "[DONE]" in done.stdout if '"stream": true' in line else json.loads(done.stdout)
