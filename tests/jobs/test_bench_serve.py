"""The benchmark of serving: what it prints can be read, its parts can be chosen."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from jobs import bench_serve, serving
from jobs.bench_serve import PARTS
from jobs.measure import Timing
from jobs.servers import Server
from jobs.serving_report import bars
from linearized.errors import ClusterError


def invoke(*options: str):
    app = typer.Typer()
    app.command()(bench_serve.main)
    return CliRunner().invoke(app, list(options))


@pytest.mark.parametrize(
    "option,value",
    [
        ("--parts", "one,everything"),
        ("--loads", "8x"),
        ("--request", "0x4"),
        ("--gguf", "model.gguf"),
        ("--run", "nowhere"),
    ],
)
def test_bad_options_are_refused(pair, option, value):
    done = invoke("--run", str(pair), option, value)
    assert done.exit_code == 2
    assert option in done.output or value.split(",")[-1] in done.output


def test_bars_are_what_was_measured():
    second, half = Timing.of([1.0]), Timing.of([0.5])
    ours = {"token": half, "between_p99": 0.2}
    theirs = {"token": second, "between_p99": 0.1}
    found = {
        "one": {
            "engine": {"token": half, "first": half},
            "ours": {"token": second, "first": second},
            "round_trip": {"unix": {"p50": 1e-4}},
        },
        "many": {"2 x 16": {"ours": ours, "transformers serve": theirs}, "1 x 8": {"ours": ours}},
        "prefix": {"new": second, "seen": half, "shared": 16},
        "draft": {"none": {"token": second}, "model": {"token": half}},
        "killed": {"gap_p99": 1.5, "differing": 0},
        "rate": {"requests": 9, "errors": 1, "first_p99": 1.9},
    }
    met = [(round(bar.value, 9), bar.met) for bar in bars(found) if bar.value is not None]
    assert met == [
        (2.0, False), (500.0, False), (0.1, True), (2.0, True),
        (2.0, True), (2.0, False),
        (0.5, False), (16, True), (1.5, True), (0, True), (1, False), (1.9, True),
    ]  # fmt: skip
    assert [bar.name for bar in bars(found) if bar.value is None] == [
        "1 x 8: tokens/s, ours / transformers serve",
        "1 x 8: between tokens p99, ours / transformers serve",
    ]
    assert all(bar.value is None for bar in bars({}))
    no_rate = {"rate": {"requests": 0, "errors": 0, "first_p99": 0.0}}
    assert all(bar.value is None for bar in bars(no_rate))


def test_a_part_that_fails_does_not_spoil_the_others(pair, monkeypatch):
    started: list[list[str]] = []

    @contextlib.contextmanager
    def app(target, settings):
        started.append(settings)
        if "target_replicas=2" in settings:
            raise ClusterError("the app did not start: too few CPUs")
        yield Server(name="ours", url="http://127.0.0.1:9", model="m")

    async def fails(*_):
        raise ClusterError("the stream ends with an error")

    async def found(*_):
        return {"requests": 8, "rate": 1.0, "first_p99": 0.5, "errors": 0, "reasons": []}

    monkeypatch.setattr(bench_serve, "ours", app)
    monkeypatch.setattr(serving, "seen_before", fails)
    monkeypatch.setattr(serving, "at_highest_rate", found)
    options = ["--quick", "--parts", "killed,prefix,rate", "--threads", "2"]
    done = invoke("--run", str(pair), *options, "--settings", "pack=false")
    assert done.exit_code == 1
    record = json.loads(done.stdout.splitlines()[-1])
    assert set(record["results"]) == {"rate"}
    assert set(record["failed"]) == {"prefix", "killed"}
    assert "too few CPUs" in record["failed"]["killed"] and "too few CPUs" in done.output
    alone, two = started  # prefix and rate share an app
    assert "target_cpus=2" in alone and "pack=false" in alone and "target_replicas=2" in two


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_last_line_is_all_of_it(pair):
    command = [sys.executable, "-m", "jobs.bench_serve", "--quick", "--run", str(pair)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    results = record["results"]
    assert set(results) == set(PARTS)
    assert set(results["many"]["2 x 16"]) == {"ours", "transformers serve"}
    assert results["killed"]["differing"] == 0 and len(results["killed"]["gaps"]) == 1
    assert results["rate"]["requests"] == 12 and results["rate"]["errors"] == 0
    assert results["prefix"]["shared"] == 16
    assert all(bar["met"] is not None for bar in record["bars"])
