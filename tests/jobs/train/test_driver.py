"""Runs under Ray Train: what ends them, and what does not."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.local import LocalCluster
from jobs.run import Run, Workers
from jobs.train import checkpoints, fit
from jobs.train.driver import _first_line, _may_pass, _reasons
from linearized.errors import ConfigError, LinearizedError

ROOT = Path(__file__).parents[3]
FIT = """
import pickle, sys
from jobs.train import fit
from linearized.errors import LinearizedError
try:
    fit(pickle.load(open({file!r}, "rb")))
except LinearizedError as error:
    print(f"error: {{type(error).__name__}}: {{error}}", file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(num_cpus=2) as running:
        yield running


def start(run: Run, env: dict[str, str]) -> subprocess.Popen[str]:
    """`fit` in a process of its own."""
    file = run.out.with_name(f"{run.out.name}.pickle")
    file.write_bytes(pickle.dumps(run))
    return subprocess.Popen(
        [sys.executable, "-c", FIT.format(file=str(file))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
        start_new_session=True,
    )


def done(run: Run, env: dict[str, str]) -> dict:
    process = start(run, env)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return json.loads((run.out / "run.json").read_text())


def wait_for(run: Run, stage: int, process: subprocess.Popen[str]) -> None:
    """Until there is a checkpoint of this stage."""
    root = Path(run.checkpoints(run.key()))
    deadline = time.monotonic() + 200
    while not list(root.glob(f"stage-{stage:02d}-*/checkpoint.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_what_a_worker_refuses_is_one_line_and_is_not_tried_again(run, cluster):
    """Blocks are shorter than the context that a stage asks for: no worker could ever do it."""
    stages = (replace(run.stages[0], context=4096), run.stages[1])
    bad = replace(run, stages=stages, workers=Workers(count=1, zero=0, max_failures=3))
    run.out.mkdir()
    (run.out / "run.json").write_text("{}")
    process = start(bad, cluster.env)
    said, _ = process.communicate()
    lines = [line for line in said.splitlines() if "error:" in line]
    assert process.returncode == 2, said
    assert lines == ["error: ConfigError: context must be from 2 to the block's 24, got 4096"]
    assert "Traceback" not in said
    tries = list(Path(bad.checkpoints(bad.key())).glob("ray-*"))
    assert len(tries) == 1
    assert (run.out / "run.json").read_text() == "{}", "nothing is lost"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_killed_worker_costs_no_step(run, cluster):
    whole = replace(run, out=run.out.with_name("whole"), workers=Workers(count=2, zero=2))
    cut = replace(run, workers=Workers(count=2, zero=2))
    want = done(whole, cluster.env)
    process = start(cut, cluster.env)
    wait_for(cut, 0, process)
    os.kill(worker_process(cluster.token), signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "goes on after step" in said
    found = json.loads((cut.out / "run.json").read_text())
    assert [x[:3] for x in found["losses"]] == [x[:3] for x in want["losses"]]
    assert found["perplexity"] == want["perplexity"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_killed_driver_costs_no_step(run, cluster):
    whole = replace(run, out=run.out.with_name("whole"))
    want = done(whole, cluster.env)
    process = start(run, cluster.env)
    wait_for(run, 1, process)
    process.kill()
    process.wait()
    found = done(replace(run, storage=None), cluster.env)
    assert [x[:3] for x in found["losses"]] == [x[:3] for x in want["losses"]]
    assert checkpoints.latest(run.checkpoints(run.key())) == (None, [])
    again = fit(run)
    assert again == found, "a finished run is reused"


def worker_process(token: str) -> int:
    """A training worker of this test's own cluster."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes()
            if b"RayTrainWorker" in title and token.encode() in (process / "environ").read_bytes():
                return int(process.name)
        except OSError:
            continue
    raise AssertionError("no training worker is running")


def test_what_may_pass_is_told_from_what_would_repeat():
    from ray.exceptions import ActorDiedError

    assert _may_pass(ActorDiedError())
    assert _may_pass(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"))
    assert not _may_pass(ValueError("shapes do not match"))
    assert _first_line(ValueError("\n one \n two")) == "ValueError: one"
    assert _first_line(KeyError()) == "KeyError: it says nothing"


def test_what_ray_itself_stumbles_over_is_named():
    from ray.train import ControllerError, WorkerGroupError

    assert _reasons(ControllerError(KeyError("x")))[0].args == ("x",)
    assert str(_reasons(WorkerGroupError("said", {0: ValueError("y")}))[0]) == "y"


def test_errors_of_workers_survive_the_way_to_the_driver():
    """Ray pickles them."""
    for error in (ConfigError("a"), LinearizedError("b")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
