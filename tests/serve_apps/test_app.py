"""The whole app: three deployments on a Ray cluster, through real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest
import yaml
from click import ClickException
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import ServeDeploySchema

from cluster import keeper
from cluster.local import LocalCluster
from jobs.streams import Streams
from serve_apps import metrics
from serve_apps.app import Deployed, Given, build
from serve_apps.link.protocol import Endpoint

ROOT = Path(__file__).parents[2]
PROMPT = "the quick brown fox"


def test_the_app_fits_two_cpus():
    args = Given.model_validate({"target": "t", "draft": "d"})
    assert args.ingress_cpus + args.target_cpus + args.draft_cpus <= 2
    assert set(deployments(args)) == {"ingress", "target", "draft"}


def test_a_draft_in_the_targets_process_is_no_deployment():
    args = Given.model_validate({"target": "t", "draft": "d", "draft_replicas": "0"})
    found = deployments(args)
    assert set(found) == {"ingress", "target"}
    config, draft, _ = found["target"].init_args
    assert draft is None and config.draft == "d"
    args = Given.model_validate({"target": "t", "draft": "d"})
    config, draft, _ = deployments(args)["target"].init_args
    assert draft is not None and config.draft is None


def test_several_targets_share_the_draft():
    args = Given.model_validate({"targets": '{"a": "t", "b.2": "u"}', "draft": "d"})
    found = deployments(args)
    assert set(found) == {"ingress", "target-a", "target-b.2", "draft"}
    assert [found[f"target-{name}"].init_args[0].path for name in ("a", "b.2")] == ["t", "u"]
    assert len({found[f"target-{name}"].init_args[1] for name in ("a", "b.2")}) == 1


def test_what_is_wrong_is_said_in_one_line():
    for given, says in {
        "depth": ("0", "depth: Input should be greater than or equal to 1, got '0'"),
        "typo": ("1", "typo: Extra inputs are not permitted, got '1'"),
        "link_ports": ("9-8", "link_ports must lie between 1 and 65535, got '9-8'"),
        "targets": ("a", "targets: they must be names with folders, such as"),
    }.items():
        with pytest.raises(ClickException) as refused:
            Given.model_validate({"target": "t", given: says[0]})
        assert refused.value.message.startswith(says[1]) and "\n" not in refused.value.message


def test_the_config_file_is_one_that_serve_and_the_app_take():
    text = (ROOT / "serve_apps" / "config.yaml").read_text()
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (one,) = config.applications
    args = Given.model_validate(one.args)
    assert one.import_path == "serve_apps.app:build" and list(args.folders) == ["small", "large"]
    assert config.http_options.request_timeout_s > args.request_s


async def test_where_replicas_are(monkeypatch):
    """Through Serve's handle, in its mode without a cluster."""
    here = Endpoint(host="h", port=1, secret=b"s", fingerprint="f", vocab_size=2)
    asked = []

    class Served:
        async def endpoint(self):
            asked.append(1)
            if len(asked) == 2:
                await asyncio.sleep(60)
            return here

    handle = serve.run(serve.deployment(Served).bind(), _local_testing_mode=True)
    deployed = Deployed(handle)
    assert await deployed.endpoints() == [here]
    monkeypatch.setattr("serve_apps.app.ANSWER_S", 0.2)
    assert await deployed.endpoints() == [here]  # one that hangs keeps nobody from finding others
    assert len(asked) == 3
    await deployed.wake()
    assert len(asked) == 4

    def nobody(_):
        raise DeploymentUnavailableError(DeploymentID(name="draft"))

    monkeypatch.setattr(handle, "broadcast", nobody)
    assert await deployed.endpoints() == []


def deployments(args):
    """By name, of the app that is built."""
    found = {}

    def visit(application):
        deployment = application._bound_deployment
        found[deployment.name] = deployment
        for one in deployment.init_args:
            if isinstance(one, type(application)):
                visit(one)

    visit(build(args))
    return found


@pytest.fixture(scope="module")
def app(folders):
    """The app as users start it; its URL, and the cluster's folder."""
    every_second = {
        f"RAY_SERVE_{kind}_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1"
        for kind in ("REPLICA", "HANDLE")
    }
    with LocalCluster(num_cpus=2, env=every_second) as cluster:
        url = started(cluster, folders, "target_replicas=2", "target_cpus=0.5")
        yield App(url, cluster.temp, lambda *args: run(cluster, folders, *args))


def started(cluster, folders, *args):
    """The app's URL."""
    command(cluster, "start", "--http-host", "127.0.0.1", "--http-port", str(cluster.http_port))
    run(cluster, folders, *args)
    url = f"http://127.0.0.1:{cluster.http_port}"
    until(lambda: httpx.get(f"{url}/health").status_code == 200, 240)
    return url


class App(NamedTuple):
    url: str
    folder: Path
    """The cluster's."""
    run: Callable[..., None]
    """Deploys it anew, with these settings."""


def run(cluster, folders, *args):
    both = [f"{name}={folders[name]}" for name in ("target", "draft")]
    args = (*both, "max_context=200000", "max_body=100000", *args)
    command(cluster, "run", "--non-blocking", "serve_apps.app:build", *args)


def command(cluster, *words):
    done = subprocess.run(
        [sys.executable, "-m", "ray.serve.scripts", *words],
        env={**os.environ, **cluster.env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,  # until all replicas are warm
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def client(app):
    with httpx.Client(base_url=app.url, timeout=60) as client:
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
    targets = replicas(app.folder, "target")
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
    url, folder, _ = app
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
    url, folder, _ = app
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


SETTINGS = [
    {"max_tokens": 600, "speculate": "model"},
    {"max_tokens": 600, "temperature": 0.9, "seed": 7},
    {"max_tokens": 400, "temperature": 0.9, "seed": 8, "n": 2},
    {"max_tokens": 400, "logprobs": 1, "speculate": "none"},
]


class Readers:
    """Read the same few texts again and again, side by side, for as long as it lasts."""

    def __init__(self, url, calm, each=1):
        self._url, self._ended, self.read, self.wrong = url, threading.Event(), 0, []
        self._threads = [
            threading.Thread(target=self._go_on, args=(*one,))
            for one in zip(SETTINGS * each, calm * each, strict=True)
        ]

    def _go_on(self, settings, expected):
        with httpx.Client(base_url=self._url, timeout=240) as own:
            while not self._ended.is_set():
                try:
                    found = events(own, **settings)
                except Exception as error:
                    found = error
                if found != expected:
                    self.wrong.append((settings, found))
                self.read += 1

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_new_version_in_mid_stream_changes_nothing(app, client):
    """All replicas are replaced, the ingress' too."""
    calm = [events(client, **one) for one in SETTINGS]
    former = {kind: set(replicas(app.folder, kind)) for kind in ("target", "ingress")}
    moved = said(app.folder, "a text goes on elsewhere")
    with Readers(app.url, calm) as readers:
        app.run("target_replicas=2", "target_cpus=0.5", "read_ms=150")
        until(lambda: not any(p.is_running() for ps in former.values() for p in ps), 240)
        read = readers.read
        until(lambda: readers.read > read + len(calm), 120)
    assert not readers.wrong
    assert len(replicas(app.folder, "target")) == 2
    assert said(app.folder, "a text goes on elsewhere") > moved


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replicas_follow_the_load_and_texts_stay_the_same(app, client):
    calm = [events(client, **one) for one in SETTINGS]
    scaled = ["target_max_replicas=2", "draft_replicas=0", "draft_max_replicas=2", "max_sessions=4"]
    scaled += ["draft_sessions=4", "scale_up_s=1", "scale_down_s=5", "target_cpus=0.5"]
    app.run(*scaled, "draft_cpus=0.3")

    def running():
        return tuple(len(replicas(app.folder, kind)) for kind in ("target", "draft"))

    until(lambda: running() == (1, 0), 240)
    time.sleep(5)
    assert running() == (1, 0)  # to look for drafts starts none
    assert client.get("/health").json() == {"status": "ok", "draft": "away"}
    with Readers(app.url, calm, each=3) as readers:
        seen = []
        until(lambda: seen.append(running()) or {2} <= {targets for targets, _ in seen}, 300)
        until(lambda: seen.append(running()) or any(drafts for _, drafts in seen), 300)
        read = readers.read
        until(lambda: readers.read > read + 3 * len(calm), 240)
    assert not readers.wrong
    quiet = {"max_tokens": 200, "speculate": "none"}
    expected = events(client, **quiet)
    while running() != (1, 0):
        assert events(client, **quiet) == expected
    assert events(client, **SETTINGS[0]) == calm[0]  # with drafts or without


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_dies_takes_no_text_with_it(folders):
    """ray#65502: requests fail when the node of their replica goes away."""
    with LocalCluster(num_cpus=2) as cluster, node(cluster, num_cpus=1) as second:
        settings = ["ingress_cpus=0.6", "draft_cpus=0.4", "target_cpus=1", "target_replicas=2"]
        url = started(cluster, folders, *settings)
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


def said(folder, words):
    """How often, in the logs of all processes."""
    logs = (folder / "session_latest" / "logs").glob("worker-*.err")
    return sum(log.read_text(errors="replace").count(words) for log in logs)


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
