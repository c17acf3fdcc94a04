"""Requests: what is taken, what is refused, and by which name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linearized.speculative import Sampling
from serve_apps.generation import Guide
from serve_apps.http import bodies, requests
from serve_apps.http.errors import ApiError
from serve_apps.http.fields import Limits
from serve_apps.http.requests import ChatRequest, CompletionRequest, DetokenizeRequest

OK = {"model": "m", "prompt": "hello"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
LIMITS = Limits(max_context=100, vocab_size=300, max_characters=1000)


def parse(kind, values):
    body = values if isinstance(values, bytes) else json.dumps(values).encode()
    return requests.validate(kind, bodies.parse(body), LIMITS)


def request(**values):
    return parse(CompletionRequest, {**OK, **values})


def chat(**values):
    return parse(ChatRequest, {**CHAT, **values})


def refusal(kind, values) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(kind, values)
    return caught.value


def jobs(asked, prompts=((1, 2),), seed=7):
    return asked.generations(list(prompts), seed=seed, owner="me", limits=LIMITS)


def test_defaults_are_openais():
    asked = request()
    assert (asked.temperature, asked.top_p, asked.n) == (1.0, 1.0, 1)
    (job,) = jobs(asked)
    assert job.sampling == Sampling(temperature=1.0, seed=7)
    assert (job.prompt, job.stop, job.speculate, job.owner) == ((1, 2), (), None, "me")
    assert (job.max_tokens, job.logprobs, job.prompt_logprobs) == (16, None, None)
    (job,) = jobs(chat())
    assert job.max_tokens == 98  # all that is left


@pytest.mark.parametrize(
    "prompt, prompts",
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_prompts(prompt, prompts):
    assert request(prompt=prompt).prompt == prompts


def test_each_text_has_a_choice_number_of_its_own():
    found = jobs(request(prompt=["a", "b"], n=2), [(1,), (2,)])
    assert [job.prompt for job in found] == [(1,), (1,), (2,), (2,)]
    assert [job.sampling.choice for job in found] == [0, 1, 2, 3]


def test_everything_reaches_the_target():
    asked = request(
        max_completion_tokens=30, min_tokens=2, top_k=5, min_p=0.1, presence_penalty=0.5,
        frequency_penalty=-1, repetition_penalty=1.2, logit_bias={"5": -100, "7": 2.5},
        stop=["a", "b"], stop_token_ids=[5, 0, 5], logprobs=3, echo=True, speculate="ngram",
        guided={"regex": "a+"},
    )  # fmt: skip
    (job,) = jobs(asked)
    assert job.sampling == Sampling(
        temperature=1.0, top_k=5, min_p=0.1, presence_penalty=0.5, frequency_penalty=-1.0,
        repetition_penalty=1.2, logit_bias={5: -100.0, 7: 2.5}, min_tokens=2,
        stop_ids={0, 5}, seed=7,
    )  # fmt: skip
    assert (job.max_tokens, job.stop, job.logprobs) == (30, ("a", "b"), 3)
    assert (job.prompt_logprobs, job.guide) == (3, Guide("regex", "a+"))


def test_guides():
    schema = {"type": "object"}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert chat(response_format={"type": "text"}).guide is None
    assert chat(response_format={"type": "json_object"}).guide == Guide("json")
    assert chat(response_format=named).guide == Guide("json_schema", '{"type": "object"}')
    assert chat(guided={"json_schema": schema}).guide == Guide("json_schema", '{"type": "object"}')
    assert chat(guided={"choice": ["a", "b"]}).guide == Guide("choice", '["a", "b"]')


def test_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(
        messages=[{"role": "developer", "content": parts}, {"role": "user", "content": ""}]
    )
    assert asked.messages == (
        {"role": "system", "content": "ab"},
        {"role": "user", "content": ""},
    )
    assert chat(logprobs=True).named == 0
    assert chat(logprobs=True, top_logprobs=4).named == 4
    assert chat().named is None


def test_null_asks_for_the_default():
    asked = request(temperature=None, stop=None, seed=None, logprobs=None, stream_options=None)
    assert asked == request()


def test_values_that_ask_for_nothing_pass():
    neutral = {"n": 1, "best_of": 1, "logit_bias": {}, "suffix": "", "presence_penalty": 0.0}
    assert request(**neutral, user="me") == request(user="me")
    assert chat(tools=[], tool_choice="none", store=False, modalities=["text"]) == chat()


@pytest.mark.parametrize(
    "values, param, code",
    [
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 33}, "n", "invalid_value"),
        ({"n": 2**70}, "n", None),
        ({"n": 4, "prompt": ["a"] * 9}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"best_of": True}, "best_of", "unsupported_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": "1"}}, "logit_bias", "invalid_value"),
        ({"logit_bias": [5]}, "logit_bias", "invalid_type"),
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"colour": 1}, "colour", "unknown_parameter"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": "16"}, "max_tokens", "invalid_type"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "invalid_value"),
        ({"min_tokens": 17}, "min_tokens", "invalid_value"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": 10**400}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"min_p": 2}, "min_p", "invalid_value"),
        ({"top_k": -1}, "top_k", "invalid_value"),
        ({"top_k": 2**80}, "top_k", None),
        ({"seed": 2**63}, "seed", None),
        ({"stream": 1}, "stream", "invalid_type"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": "a" * 1001}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": [1]}, "stop", "invalid_type"),
        ({"stop_token_ids": 5}, "stop_token_ids", "invalid_type"),
        ({"stop_token_ids": [True]}, "stop_token_ids", "invalid_type"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_value"),
        ({"stop_token_ids": list(range(129))}, "stop_token_ids", "invalid_value"),
        ({"speculate": "yes"}, "speculate", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"guided": {}}, "guided", "invalid_value"),
        ({"guided": {"regex": "a", "grammar": "b"}}, "guided", "invalid_value"),
        ({"guided": {"choice": []}}, "guided", "invalid_value"),
        ({"guided": {"regex": 5}}, "guided", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt", "invalid_value"),
        ({"prompt": ["a", 1]}, "prompt", "invalid_type"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_type"),
        ({"prompt": [True]}, "prompt", "invalid_type"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [300]}, "prompt", "invalid_value"),
        ({"prompt": [1] * 101}, "prompt", "context_length_exceeded"),
        ({"prompt": "a" * 1001}, "prompt", "context_length_exceeded"),
        ({"prompt": None}, "prompt", "missing_parameter"),
        ({"prompt": ["a"] * 100}, "prompt", "invalid_value"),
        ({"model": None}, "model", "missing_parameter"),
    ],
)
def test_refused_by_name(values, param, code):
    error = refusal(CompletionRequest, {**OK, **values})
    assert error.status == 400
    assert error.param == param
    assert param.split(".")[0] in error.message
    assert code is None or error.code == code
    assert len(error.message) < 400


@pytest.mark.parametrize(
    "values, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": [5]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 1001}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"echo": True}, "echo"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_chats_are_refused_by_name(values, param):
    error = refusal(ChatRequest, {**CHAT, **values})
    assert (error.status, error.param) == (400, param)


def test_what_users_send_is_not_repeated_whole():
    for values in ({"colour" * 10_000: 1}, {"stop": ["a" * 50_000]}, {"speculate": "x" * 50_000}):
        error = refusal(CompletionRequest, {**OK, **values})
        assert len(error.message) < 400 and len(error.param or "") <= 100


@pytest.mark.parametrize(
    "rule", [{"json_schema": {"title": "x" * 10**6}}, {"choice": ["x" * 10**6, "y"]}]
)
def test_a_long_rule_is_not_written_out(rule, monkeypatch):
    body = json.dumps({**OK, "guided": rule}).encode()
    monkeypatch.setattr("serve_apps.http.fields.json.dumps", lambda *_, **__: pytest.fail("was"))
    error = refusal(CompletionRequest, body)
    assert (error.status, error.param) == (400, "guided") and "65536" in error.message


def test_the_first_wrong_element_is_enough():
    """vllm#49239: an error is built for each of a million elements."""
    for wrong in (["a"] * 30 + [5] * 200_000, [1] * 50 + ["a"] * 50, [[1]] * 10 + [[-1]]):
        assert len(refusal(CompletionRequest, {**OK, "prompt": wrong}).message) < 400
    assert refusal(DetokenizeRequest, {"tokens": [1] * 101}).code == "context_length_exceeded"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@pytest.mark.parametrize("kind, ok", [(CompletionRequest, OK), (ChatRequest, CHAT)])
@given(data=st.data())
def test_any_values_make_a_request_or_an_error(kind, ok, data):
    names = st.sampled_from([*kind.model_fields, *kind.UNSUPPORTED, "other"])
    values = data.draw(st.dictionaries(names, json_values, max_size=4))
    try:
        asked = parse(kind, {**ok, **values})
    except ApiError as error:
        assert error.status == 400 and error.message
    else:
        assert jobs(asked)
