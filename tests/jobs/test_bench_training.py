"""The benchmark of training: what it prints can be read, long texts are recomputed."""

from __future__ import annotations

import json

import typer
from typer.testing import CliRunner

from jobs import bench_training


def invoke(*options: str):
    app = typer.Typer()
    app.command()(bench_training.main)
    return CliRunner().invoke(app, list(options))


def test_both_are_timed_at_every_length():
    done = invoke("--quick", "--kv-heads", "1")
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert {length: found["recomputed"] for length, found in results.items()} == {
        "128": False, "256": True,
    }  # fmt: skip
    for found in results.values():
        assert set(found["tokens_per_second"]) == {"ours (chunks)", "softmax (SDPA)"}
        assert not found["left_out"]


def test_bad_options_are_refused():
    for options in (["--hidden", "100"], ["--lengths", "1"], ["--dtype", "int3"]):
        done = invoke(*options)
        assert done.exit_code == 2 and options[1] in done.output
