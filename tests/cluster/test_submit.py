"""Jobs through Ray's real command: followed, failed, stopped, refused."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from cluster.local import LocalCluster
from cluster.submit import submit
from linearized.errors import ClusterError, JobError

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(num_cpus=2) as cluster:
        yield cluster
    assert not cluster.temp.exists()


def _python(code: str) -> list[str]:
    return ["python", "-c", code]


def test_events_of_driver_and_workers_arrive(cluster, tmp_path, capsys):
    """From the repository itself, as the demo does; so its upload is looked at too."""
    code = """
import os, pathlib, time, ray
from cluster.progress import Progress, note, result
ray.init()
@ray.remote
def work():
    with Progress("work", total=8, unit="steps") as bar:
        for step in range(8):
            time.sleep(0.1)
            bar.update(step + 1, loss=1.0 / (step + 1))
note("hello  there")
ray.get(work.remote())
here = pathlib.Path.cwd()
size = sum(file.stat().st_size for file in here.rglob("*") if file.is_file())
result({"names": sorted(os.listdir()), "bytes": size, "threads": os.environ.get("OMP_NUM_THREADS")})
time.sleep(1)
"""
    events = []
    # What leads to the cluster over HTTP is enough: nothing is read from its machine.
    env = {
        name: value
        for name, value in cluster.env.items()
        if name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    }
    log = tmp_path / "logs" / "job.log"
    submit(env, _python(code), name="two words", working_dir=ROOT, log=log, on_event=events.append)
    assert events[0].text == "hello there"
    bars = [event for event in events if event.kind == "progress"]
    assert {event.stage for event in bars} == {"work"}
    assert bars[0].state == "running"
    assert 3 <= len(bars) <= 8
    assert (bars[-1].state, bars[-1].done) == ("done", 8)
    assert bars[-1].values == {"loss": 0.125}
    found = next(event.values for event in events if event.kind == "result")
    assert {"cluster", "linearized", "jobs", "pyproject.toml"} <= set(found["names"])
    assert not {".venv", ".git", "runs", ".ruff_cache", ".pytest_cache"} & set(found["names"])
    assert found["bytes"] < 10_000_000
    assert "::note hello there" in log.read_text()
    assert "(work pid=" in log.read_text()
    assert capsys.readouterr().out == ""


def test_failed_job_is_explained(cluster, tmp_path, capfd):
    code = (
        "from cluster.progress import Progress, note\n"
        "import sys\n"
        "note('so far so good')\n"
        "with Progress('load', total=1): print('reading it')\n"
        # In one piece each: Ray writes into the same log, whenever it gets to it.
        "for i in range(3000): sys.stdout.write(f'line {i}\\n')\n"
        "print('error: the corpus is empty', file=sys.stderr)\n"
        "sys.exit(2)\n"
    )
    (tmp_path / "cluster").symlink_to(ROOT / "cluster")
    log = tmp_path / "job.log"
    with pytest.raises(JobError, match="the corpus is empty") as error:
        submit(cluster.env, _python(code), name="data", working_dir=tmp_path, log=log)
    assert (error.value.job, error.value.status) == ("data", "FAILED")
    assert len(error.value.tail) == 20
    assert error.value.tail[-2:] == ("line 2999", "error: the corpus is empty")
    assert str(log) in str(error.value)
    lines = log.read_text().splitlines()
    assert [line for line in lines if line.startswith("line ")] == [
        f"line {i}" for i in range(3000)
    ]
    # Without a listener a display shows the events, and only those.
    shown = capfd.readouterr().out
    assert "so far so good" in shown
    assert "✓ load" in shown
    assert "line 7" not in shown


def test_nothing_is_written_into_the_folder_that_goes_with_a_job(cluster, tmp_path):
    command = ["python", "-m", "jobs.data", "demo", f"source={ROOT / 'README.md'}"]
    with pytest.raises(JobError, match="out=runs/demo/data is relative, .*LINEARIZED_STORAGE"):
        submit(cluster.env, command, name="data", working_dir=ROOT, log=tmp_path / "job.log")


def test_interrupt_stops_the_job(cluster, tmp_path):
    seen = threading.Event()

    def interrupt() -> None:
        if seen.wait(60):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)

    marker = f"import time; print('::note up', flush=True); time.sleep({1000 + os.getpid()})"
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        submit(
            cluster.env,
            _python(marker),
            name="long",
            working_dir=tmp_path,
            log=tmp_path / "job.log",
            on_event=lambda event: seen.set(),
        )
    thread.join(1)
    assert not _running(marker)
    done = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "job", "list"],
        env={**os.environ, **cluster.env},
        capture_output=True,
        text=True,
    )
    assert re.search(r"submission_id='long-\w+'.*?STOPPED", done.stdout, re.S), done


def _running(marker: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if marker in process.cmdline():
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_what_cannot_be_submitted_is_refused(cluster, tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(JobError, match="was not taken") as error:
        submit(cluster.env, ["true"], name="x", working_dir=missing, log=tmp_path / "log")
    assert error.value.status == "REFUSED"
    env = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:1"):
        submit(env, ["true"], name="x", working_dir=tmp_path, log=tmp_path / "log")
    with pytest.raises(ClusterError, match="RAY_API_SERVER_ADDRESS"):
        submit({}, ["true"], name="x", working_dir=tmp_path, log=tmp_path / "log")
