"""The whole app: three deployments on a Ray cluster, through real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from pydantic import ValidationError

from cluster import keeper
from cluster.local import LocalCluster
from jobs.streams import Streams
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
        args = ["max_context=200000", "max_body=100000", "target_replicas=2", "target_cpus=0.5"]
        yield serve(cluster, folders, *args), cluster.temp


def serve(cluster, folders, *args):
    """Start the app, or another version of it. Its URL."""
    env = {**os.environ, **cluster.env}
    args = [f"target={folders['target']}", f"draft={folders['draft']}", *args]
    start = ["start", "--http-host", "127.0.0.1", "--http-port", str(cluster.http_port)]
    run = ["run", "--non-blocking", "serve_apps.app:build", *args]
    for command in (start, run):
        done = subprocess.run(
            [sys.executable, "-m", "ray.serve.scripts", *command],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    url = f"http://127.0.0.1:{cluster.http_port}"
    until(lambda: httpx.get(f"{url}/health").status_code == 200, 240)
    return url


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
@pytest.mark.timeout(400)
def test_whoever_is_killed_in_the_middle_changes_no_text(app, client):
    """A draft, then a target, each amid eight streams; and while they are missing."""
    url, folder = app
    until(lambda: len(replicas(folder, "target")) == 2, 240)

    async def run():
        async with eight_streams(url) as streams:
            chunks = await streams.learn()
            for kind in ("draft", "target"):
                count = await streams.all(killing(folder, kind), at=chunks // 5)
                assert (count.same, count.wrong, count.errors) == (8, [], {}), kind
            assert client.get("/health").status_code == 200
            await asyncio.to_thread(until, lambda: is_whole(client, folder), 240)
            count = await streams.all()  # with the new ones
            assert count.same == 8

    asyncio.run(run())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_ingress_breaks_its_clients_and_leaves_nothing(app, client):
    url, folder = app
    until(lambda: is_whole(client, folder), 240)

    async def run():
        async with eight_streams(url, tokens=1000) as streams:
            chunks = await streams.learn()
            count = await streams.all(killing(folder, "ingress"), at=chunks // 10)
            assert not count.wrong and count.errors
            targets = replicas(folder, "target")
            await asyncio.sleep(1.0)
            before = cpu_time(targets)
            await asyncio.sleep(1.0)
            assert cpu_time(targets) - before < 0.5  # nobody generates any more
            await asyncio.to_thread(until, lambda: is_whole(client, folder), 240)
            count = await streams.all()  # the same requests with the same seeds
            assert count.same == 8

    asyncio.run(run())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_roll_out_in_the_middle_changes_no_text(folders):
    """A new version of the app, with other settings; and then with one target fewer. (vllm and
    others end what is in progress with an error.)"""
    with LocalCluster(num_cpus=3) as cluster:
        settings = ["target_cpus=0.5", "draft_cpus=0.5"]
        both = ["target_replicas=2", *settings]
        url = serve(cluster, folders, *both)

        async def run():
            async with eight_streams(url, tokens=3000, timeout=400) as streams:
                chunks = await streams.learn()
                for changed in (["prefix_mb=100", *both], ["target_replicas=1", *settings]):

                    async def roll_out(changed=changed):
                        await asyncio.to_thread(serve, cluster, folders, *changed)

                    count = await streams.all(roll_out, at=chunks // 20, times=2)
                    assert (count.same, count.wrong, count.errors) == (16, [], {})

        asyncio.run(run())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_dies_takes_no_text_with_it(folders):
    """ray#65502: requests fail when the node of their replica goes away."""
    with LocalCluster(num_cpus=2) as cluster, node(cluster, num_cpus=1) as second:
        settings = ["ingress_cpus=0.6", "draft_cpus=0.4", "target_cpus=1", "target_replicas=2"]
        url = serve(cluster, folders, *settings)
        assert any(":target" in name for name in names(second))

        async def kill_all():
            for process in [second, *second.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

        async def run():
            async with eight_streams(url) as streams:
                chunks = await streams.learn()
                count = await streams.all(kill_all, at=chunks // 5)
                assert (count.same, count.wrong, count.errors) == (8, [], {})

        asyncio.run(run())


@contextlib.asynccontextmanager
async def eight_streams(url, *, tokens=200, timeout=120):
    streams = Streams(url, "target", tokens=tokens, timeout=timeout)
    try:
        yield streams
    finally:
        await streams.close()


@contextlib.contextmanager
def node(cluster, *, num_cpus):
    """One more of the cluster, on this machine."""
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block"]
    command += [f"--address={cluster.address}", "--node-ip-address=127.0.0.1"]
    command += [f"--num-cpus={num_cpus}", "--disable-usage-stats"]
    env = {**os.environ, **cluster.env, keeper.MARKER: str(cluster.temp)}
    del env["RAY_ADDRESS"]
    log = cluster.temp / "node.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
    try:
        until(lambda: "Ray runtime started" in log.read_text(), 90)
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def names(process):
    return [" ".join(child.cmdline()) for child in process.children(recursive=True)]


def killing(folder, kind):
    async def kill():
        replicas(folder, kind)[0].kill()

    return kill


def is_whole(client, folder):
    """Are there a draft and two targets, which are used?"""
    with contextlib.suppress(httpx.HTTPError):
        health = client.get("/health")
        connected = health.status_code == 200 and health.json()["draft"] == "connected"
        return connected and len(replicas(folder, "target")) == 2
    return False


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
