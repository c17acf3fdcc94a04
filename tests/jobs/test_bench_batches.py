"""The benchmark of batches: what it prints can be read, what does not fit is said."""

from __future__ import annotations

import json

import torch
import typer
from typer.testing import CliRunner

from jobs import bench_batches


def invoke(*options: str):
    app = typer.Typer()
    app.command()(bench_batches.main)
    return CliRunner().invoke(app, list(options))


def test_both_are_timed_at_every_batch():
    done = invoke("--quick", "--kv-heads", "1", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.splitlines()[-1])
    cases = record["results"]["128"]
    assert [case["batch"] for case in cases] == [1, 2]
    assert record["config"]["dtype"] == "bfloat16"
    for case in cases:
        assert set(case["time"]) == {"ours", "softmax, static cache"} and not case["left_out"]
        assert case["bytes"] == cases[0]["bytes"]


def test_what_does_not_fit_is_left_out(monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate too much")

    monkeypatch.setattr(bench_batches, "_static", full)
    done = invoke("--quick")
    assert done.exit_code == 0, done.output
    for case in json.loads(done.stdout.splitlines()[-1])["results"]["128"]:
        assert set(case["time"]) == {"ours"}
        assert "allocate too much" in case["left_out"]["softmax, static cache"]


def test_bad_options_are_refused():
    for options in (["--hidden", "100"], ["--batches", "0"], ["--dtype", "int3"]):
        done = invoke(*options)
        assert done.exit_code == 2 and options[1] in done.output
