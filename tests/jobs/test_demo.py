"""The demo: interrupted, it leaves nothing behind; run whole, it keeps its promises."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import cli, data, probe
from jobs import demo as demo_job
from jobs.demo import DemoConfig
from jobs.recipes import RECIPES

ROOT = Path(__file__).parent.parent.parent
MARK = "LINEARIZED_TEST_MARK"


def start(run: Path, *settings: str) -> subprocess.Popen[str]:
    """The demo in a session of its own; whatever it starts inherits the mark."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.demo", "demo", f"run={run}", *settings],
        cwd=ROOT,
        env={**os.environ, MARK: str(run)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def marked(run: Path) -> list[str]:
    """Command lines of the processes that carry the mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={run}\0".encode() in (process / "environ").read_bytes():
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append(line[:100])
        except OSError:
            continue
    return found


@pytest.mark.ray
@pytest.mark.parametrize(
    "how",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
    ids=["ctrl-c", "term"],
)
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path, how):
    demo = start(tmp_path)
    try:
        deadline = time.monotonic() + 160
        log = tmp_path / "logs" / "data.log"
        while not log.exists() and time.monotonic() < deadline:
            assert demo.poll() is None, demo.communicate()[0]
            time.sleep(0.2)
        assert any("raylet" in line or "gcs_server" in line for line in marked(tmp_path))
        demo.send_signal(how)
        output, _ = demo.communicate(timeout=60)
    finally:
        demo.kill()
        demo.wait()
    assert demo.returncode not in (0, None)
    assert "Traceback" not in output
    deadline = time.monotonic() + 60
    while marked(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert marked(tmp_path) == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_demo(tmp_path):
    demo = start(tmp_path)
    output, _ = demo.communicate(timeout=1400)
    assert demo.returncode == 0, output
    assert marked(tmp_path) == []
    report = json.loads((tmp_path / "report.json").read_text())
    perplexity = report["perplexity"]
    assert perplexity["linearized"] <= 1.08 * perplexity["teacher"]
    assert perplexity["swapped"] > perplexity["linearized"]
    ratios = {name: found["all"] for name, found in report["after_transfer"].items()}
    assert 0.95 < ratios["anchored"] < ratios["grouped"]
    assert report["texts_equal"] is True
    assert report["accepted_length"] > 1.2
    assert (tmp_path / "report.png").stat().st_size > 10_000
    made = [tmp_path / name / "run.json" for name in ("teacher", "target", "draft")]
    before = [file.stat().st_mtime_ns for file in made]
    again = start(tmp_path)
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output
    assert [file.stat().st_mtime_ns for file in made] == before, "finished stages are reused"


def test_a_model_of_the_users_own_is_adapted(tmp_path):
    config = DemoConfig(run=tmp_path, fresh=True)
    stages = demo_job._training(tmp_path, Path("/m"), config)
    assert list(stages) == ["data", "probe", "linearize", "draft"]
    assert all(command[-1] == "fresh=true" for command in stages.values())
    assert stages["linearize"][2:5] == ["jobs.finetune", "adapt", "stages.transfer.steps=60"]
    run = cli.configured(RECIPES, stages["linearize"][3:])
    assert run.student == Path("/m") and run.out == tmp_path / "target" and run.fresh
    assert "tokenizer=/m" in stages["data"]
    own = demo_job._training(tmp_path, None, DemoConfig(run=tmp_path))
    assert list(own) == ["data", "teacher", "probe", "linearize", "draft"]
    for name in ("teacher", "linearize", "draft"):
        cli.configured(RECIPES, own[name][3:])
    for name, module in (("data", data), ("probe", probe)):
        for command in (own[name], stages[name]):
            cli.configured(module.RECIPES, command[3:])
