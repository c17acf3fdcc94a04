"""The GPU check: goes on after failures, keeps what it has, and needs little to be installed."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from jobs import gpu_check
from jobs.gpu_check import Step

MACHINE = {"python": "3", "torch": "2", "device": None}
FOREIGN = ("ray", "deepspeed", "datasets", "fastapi", "xdist", "pytest_asyncio", "pytest_timeout")


@pytest.fixture(autouse=True)
def handlers():
    """The command changes what SIGTERM does."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def step(name: str, code: str, limit: float = 60) -> Step:
    return Step(name=name, command=[sys.executable, "-c", code], limit=limit)


@pytest.fixture
def parts(monkeypatch):
    """Three small parts in place of the real ones."""
    made = {
        "tests": lambda device, out: [
            step("broken", "print('about to break'); raise SystemExit(3)"),
            step("endless", "print('began', flush=True); import time; time.sleep(60)", limit=1),
        ],
        "ops": lambda device, out: [step("fine", "print('a table'); print('{\"speed\": 3}')")],
        "sanitizer": lambda device, out: [
            Step(name="memcheck", command=[], limit=0, env={"why": "it is not installed"})
        ],
    }
    monkeypatch.setattr(gpu_check, "PARTS", made)
    monkeypatch.setattr(gpu_check, "_machine", lambda: dict(MACHINE))


def run(*options: str):
    app = typer.Typer()
    app.command()(gpu_check.main)
    return CliRunner().invoke(app, list(options))


def outcomes(out: Path) -> dict[str, dict]:
    """By the name of the step, which here only one part has."""
    return {one["step"]: one for one in everything(out)}


def everything(out: Path) -> list[dict]:
    parts = json.loads((out / "report.json").read_text())["parts"]
    return [one for steps in parts.values() for one in steps]


def test_a_failure_ends_its_own_command_only(parts, tmp_path):
    done = run("--out", str(tmp_path), "--device", "cpu")
    assert done.exit_code == 1
    found = outcomes(tmp_path)
    assert {name: one["status"] for name, one in found.items()} == {
        "broken": "failed", "endless": "out of time", "fine": "passed", "memcheck": "left out",
    }  # fmt: skip
    assert found["broken"]["code"] == 3 and found["broken"]["tail"] == ["about to break"]
    assert found["endless"]["tail"] == ["began"]
    assert found["fine"]["result"] == {"speed": 3} and found["fine"]["tail"] == ["a table"]
    page = (tmp_path / "report.md").read_text()
    for said in ("about to break", "a table", "it is not installed", "figures mean nothing"):
        assert said in page
    assert "not passed: tests: broken; tests: endless" in done.output


def test_parts_that_are_not_run_again_are_kept(parts, tmp_path):
    assert run("--out", str(tmp_path), "--device", "cpu", "--part", "ops").exit_code == 0
    assert set(outcomes(tmp_path)) == {"fine"}
    run("--out", str(tmp_path), "--device", "cpu", "--part", "tests", "--limit", "1")
    assert set(outcomes(tmp_path)) == {"broken", "endless", "fine"}


def test_bad_options_are_refused(parts, tmp_path):
    for options in (["--part", "kernel"], ["--device", "tpu"]):
        done = run("--out", str(tmp_path), *options)
        assert done.exit_code == 2 and options[1] in done.output


def test_being_ended_leaves_what_there_was(tmp_path):
    script = f"""
import sys, typer
from jobs import gpu_check
from jobs.gpu_check import Step
sleep = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
def command(code):
    return [sys.executable, "-c", code]
gpu_check.PARTS = {{
    "ops": lambda device, out: [Step(name="fine", command=command("print(1)"), limit=60)],
    "models": lambda device, out: [Step(name="slow", command=command(sleep), limit=60)],
    "decode": lambda device, out: [Step(name="later", command=command("print(2)"), limit=60)],
}}
gpu_check._machine = lambda: {MACHINE!r}
typer.run(gpu_check.main)
"""
    command = [sys.executable, "-c", script, "--out", str(tmp_path), "--device", "cpu"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    log = tmp_path / "logs" / "models-slow.log"
    while not (log.exists() and log.read_text().endswith("\n")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "report.md" in said
    found = {name: one["status"] for name, one in outcomes(tmp_path).items()}
    assert found == {"fine": "passed", "slow": "interrupted", "later": "waiting"}
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "-m", "jobs.gpu_check", "--out", str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr
    assert not (tmp_path / "new").exists()


def check_bare(tmp_path: Path, *options: str) -> list[dict]:
    """Run the command where nothing foreign can be imported."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nfor name in {FOREIGN}:\n    sys.modules[name] = None\n"
    )
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "jobs.gpu_check", "--out", str(tmp_path), "--device", "cpu"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=env)
    page = (tmp_path / "report.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + page
    return everything(tmp_path)


def test_kernels_and_models_are_tested_with_little_installed(tmp_path):
    found = check_bare(tmp_path, "--part", "tests", "--part", "model")
    assert [one["status"] for one in found] == ["passed", "passed"]
    assert all(" passed" in one["summary"] for one in found)


@pytest.mark.slow
def test_every_part_runs_with_little_installed(tmp_path):
    found = check_bare(tmp_path)
    assert {one["status"] for one in found} == {"passed", "left out"}
    assert sum(one["result"] is not None for one in found) == 4


def test_every_option_of_its_commands_exists(tmp_path):
    """Those for GPUs, too, which nothing here can run."""
    steps = [one for make in gpu_check.PARTS.values() for one in make("cuda", tmp_path)]
    benches = [one.command[2:] for one in steps if one.command[1:2] == ["-m"]]
    benches = [command for command in benches if command[0].startswith("jobs.")]
    assert len(benches) > 10
    for job, *words in benches:
        app = typer.Typer()
        app.command()(importlib.import_module(job).main)
        params = typer.main.get_command(app).params
        known = {name for param in params for name in (*param.opts, *param.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, job
