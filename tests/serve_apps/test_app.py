"""The whole app: three deployments on a Ray cluster, through real HTTP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from pydantic import ValidationError

from cluster.local import LocalCluster
from serve_apps import metrics
from serve_apps.app import AppArgs, build, scale_by_texts

ROOT = Path(__file__).parents[2]
PROMPT = "the quick brown fox"


def test_arguments_come_as_text_and_are_checked():
    args = AppArgs.model_validate({"target": "t", "depth": "3", "target_cpus": "0.5"})
    assert (args.depth, args.target_cpus, args.draft) == (3, 0.5, None)
    for wrong in ({"depth": "0"}, {"typo": "1"}, {"target_replicas": 3, "target_max_replicas": 2}):
        with pytest.raises(ValidationError):
            AppArgs.model_validate({"target": "t", **wrong})


@pytest.mark.parametrize("wrong", ["many", "1-2-3", "0", "9-8", "70000", "-1"])
def test_ports_that_are_no_range(wrong):
    with pytest.raises(ValidationError, match="link_ports must"):
        AppArgs.model_validate({"target": "t", "link_ports": wrong})


def test_targets_are_as_many_as_their_texts_fill():
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 8)
    for texts, replicas in (({}, 1), ({"a": 8.0}, 1), ({"a": 8.0, "b": 1.0}, 2), ({"a": 99.0}, 4)):
        context = SimpleNamespace(
            config=config,
            aggregated_metrics={"texts": texts},
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=4,
        )
        assert scale_by_texts(context) == (replicas, {})


def test_the_app_fits_two_cpus():
    args = AppArgs.model_validate({"target": "t", "draft": "d"})
    assert args.ingress_cpus + args.target_cpus + args.draft_cpus <= 2
    assert build(args)


@pytest.fixture(scope="module")
def app(folders):
    """The app as users start it; its URL, and the cluster's folder."""
    with LocalCluster(num_cpus=2) as cluster:
        env = {**os.environ, **cluster.env}
        serve = [sys.executable, "-m", "ray.serve.scripts"]
        start = ["start", "--http-host", "127.0.0.1", "--http-port", str(cluster.http_port)]
        args = [f"target={folders['target']}", f"draft={folders['draft']}", "max_context=200000"]
        args += ["max_body=100000", "target_replicas=2", "target_cpus=0.5"]
        run = ["run", "--non-blocking", "serve_apps.app:build", *args]
        for command in (start, run):
            done = subprocess.run(
                [*serve, *command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=150
            )
            assert done.returncode == 0, done.stdout + done.stderr
        url = f"http://127.0.0.1:{cluster.http_port}"
        until(lambda: httpx.get(f"{url}/health").status_code == 200, 240)
        yield url, cluster.temp


@pytest.fixture
def client(app):
    with httpx.Client(base_url=app[0], timeout=60) as client:
        yield client


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def complete(client, **values):
    body = {"model": "target", "prompt": PROMPT, "temperature": 0, "max_tokens": 40, **values}
    return client.post("/v1/completions", json=body)


def stream(client, on_chunk=lambda: None, **values):
    """The text, the times at which its parts came, and the last chunk."""
    body = {"model": "target", "prompt": PROMPT, "temperature": 0, "stream": True, **values}
    text, times, last = "", [], None
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line:
                continue
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return text, times, last
            last = json.loads(data)
            times.append(time.perf_counter())
            on_chunk()
            text += "".join(choice["text"] for choice in last["choices"])
    raise AssertionError("the stream did not end")


@pytest.mark.ray
@pytest.mark.timeout(500)
def test_the_text_is_the_same_with_every_drafter(client):
    for settings in ({}, {"temperature": 0.8, "seed": 5}):
        answers = {}
        for speculate in ("none", "ngram", "model"):
            response = complete(client, speculate=speculate, **settings)
            assert response.status_code == 200, response.text
            answers[speculate] = response.json()
        texts = {a["choices"][0]["text"] for a in answers.values()}
        assert len(texts) == 1 and texts != {""}
        for speculate, answer in answers.items():  # whether drafting pays, the planner says
            details = answer["usage"]["completion_tokens_details"]
            accepted = details["accepted_prediction_tokens"]
            tokens = answer["usage"]["completion_tokens"]
            assert details["verification_rounds"] + accepted == tokens
            assert speculate != "none" or accepted == 0


@pytest.mark.ray
def test_a_stream_says_what_the_whole_answer_says(client):
    whole = complete(client, speculate="model").json()
    options = {"max_tokens": 40, "stream_options": {"include_usage": True}}
    for speculate in ("model", "ngram", "none"):
        text, times, last = stream(client, speculate=speculate, **options)
        assert text == whole["choices"][0]["text"]
        assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
        assert len(times) > 2


@pytest.mark.ray
def test_models_and_health(client):
    assert client.get("/health").json() == {"status": "ok", "draft": "connected"}
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["target"]


@pytest.mark.ray
def test_errors(client):
    url = "/v1/completions"
    cases = [
        (client.post(url, content=b"{no"), 400, "invalid_json"),
        (client.post(url, json={"model": "target"}), 400, "missing_parameter"),
        (complete(client, model="x"), 404, "model_not_found"),
        (complete(client, prompt=""), 400, "invalid_value"),
        (complete(client, prompt=[1, 10**6]), 400, "invalid_value"),
        (complete(client, max_tokens=-1), 400, "invalid_value"),
        (complete(client, max_tokens=200_000), 400, "context_length_exceeded"),
        (complete(client, prompt="x" * 200_000), 413, "request_too_large"),
        (complete(client, n=0), 400, "invalid_value"),
        (complete(client, best_of=2), 400, "unsupported_parameter"),
        (client.get("/nowhere"), 404, "not_found"),
        (client.get(url), 405, "method_not_allowed"),
    ]
    for response, status, code in cases:
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error["code"] == code and error["message"] and "Traceback" not in response.text
        assert len(response.headers.get_list("x-request-id")) == 1


@pytest.mark.ray
def test_prometheus_is_told(app, client):
    """Ray's agents are asked once in ten seconds or so what there is."""
    assert complete(client).status_code == 200
    (named,) = json.loads((app[1] / "prom_metrics_service_discovery.json").read_text())
    wanted = {
        metric.name for metric in (metrics.FIRST_TOKEN, metrics.GENERATED_TOKENS, metrics.RUNNING)
    } | {metrics.ROUNDS.name, metrics.SNAPSHOT_BYTES.name, metrics.SESSIONS.name}
    sample = re.compile(r"^ray_(linearized_\w+?)(_bucket|_sum|_count)?\{(.*)\} ", re.MULTILINE)

    def seen():
        pages = [httpx.get(f"http://{one}/metrics").text for one in named["targets"]]
        return {name: labels for page in pages for name, _, labels in sample.findall(page)}

    until(lambda: wanted <= seen().keys(), 60)
    found = seen()
    assert found.keys() <= metrics.METRICS.keys()
    assert all('application="default"' in labels for labels in found.values())
    assert 'deployment="draft"' in found[metrics.SESSIONS.name]


@pytest.mark.ray
def test_a_client_that_leaves_ends_its_text(app, client):
    targets = replicas(app[1], "target")
    body = {"model": "target", "prompt": PROMPT, "max_tokens": 100_000, "temperature": 0}
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=0.5)
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        next(response.iter_lines())
    time.sleep(0.5)
    before = cpu_time(targets)
    time.sleep(1.0)
    assert cpu_time(targets) - before < 0.5  # nobody generates any more


@pytest.mark.ray
def test_killing_the_draft_in_the_middle_changes_nothing(app, client):
    expected, _, _ = stream(client, max_tokens=300, speculate="none")
    (draft,) = replicas(app[1], "draft")
    texts, counts = [], [0, 0]

    def read(reader=0):
        def count():
            counts[reader] += 1

        with httpx.Client(base_url=app[0], timeout=60) as own:
            texts.append(stream(own, on_chunk=count, max_tokens=300, speculate="model")[0])

    readers = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for reader in readers:
        reader.start()
    until(lambda: min(counts) > 3, 90)
    draft.kill()
    assert max(counts) < 150  # of 300 tokens
    for reader in readers:
        reader.join()
    read()  # while there is none
    assert texts == [expected] * 3
    assert client.get("/health").status_code == 200
    until(lambda: client.get("/health").json()["draft"] == "connected", 240)
    read()  # with the new one
    assert texts[-1] == expected


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_killing_a_target_in_the_middle_changes_nothing(app, client):
    settings = [
        {"max_tokens": 300, "speculate": "none"},
        {"max_tokens": 300, "temperature": 0.9, "seed": 7},
        {"max_tokens": 300, "temperature": 0.9, "seed": 8, "n": 2, "presence_penalty": 0.5},
        {"max_tokens": 300, "stop": ["never to be seen"], "logprobs": 2},
    ]
    until(lambda: len(replicas(app[1], "target")) == 2, 240)
    calm = [events(client, **one) for one in settings]
    found: list = [None] * len(settings)
    counts = [0] * len(settings)

    def read(reader):
        def count():
            counts[reader] += 1

        with httpx.Client(base_url=app[0], timeout=120) as own:
            found[reader] = events(own, on_chunk=count, **settings[reader])

    readers = [threading.Thread(target=read, args=(i,)) for i in range(len(settings))]
    for reader in readers:
        reader.start()
    until(lambda: min(counts) > 3, 90)
    killed = replicas(app[1], "target")[0]
    killed.kill()
    assert max(counts) < 250  # of 300 rounds
    for reader in readers:
        reader.join()
    assert found == calm
    until(lambda: len(replicas(app[1], "target")) == 2, 240)


def events(client, on_chunk=lambda: None, **values):
    """Text, tokens' log-probabilities and reason of each choice, and the tokens in all."""
    body = {"model": "target", "prompt": PROMPT, "temperature": 0, "stream": True, **values}
    body["stream_options"] = {"include_usage": True}
    texts, reasons, tokens, usage = {}, {}, {}, None
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        *lines, done = [*filter(None, heard(response.iter_lines(), on_chunk))]
        assert done == "data: [DONE]"
        for line in lines:
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            usage = chunk["usage"] or usage
            for choice in chunk["choices"]:
                index = choice["index"]
                texts[index] = texts.get(index, "") + choice["text"]
                reasons[index] = choice["finish_reason"]
                found = (choice["logprobs"] or {}).get("tokens", [])
                tokens[index] = tokens.get(index, 0) + len(found)
    return texts, reasons, tokens, usage["prompt_tokens"], usage["completion_tokens"]


def heard(lines, on_line):
    for line in lines:
        on_line()
        yield line


def cpu_time(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def replicas(folder: Path, deployment: str) -> list[psutil.Process]:
    """Of this cluster: another one on this machine may have some of that name."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if "ServeReplica" in command and f":{deployment}" in command:
            parent = process.parent()
            if parent is not None and str(folder) in " ".join(parent.cmdline()):
                found.append(process)
    return found
