"""A local cluster starts, answers only who knows its token, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from cluster import local
from cluster.local import LocalCluster
from linearized.errors import ClusterError

pytestmark = pytest.mark.ray

OWNER = """
import os, subprocess, sys, time
from cluster.local import LocalCluster
with LocalCluster(num_cpus=1) as cluster:
    if "job" in sys.argv:
        command = "ray job submit --no-wait -- sleep 1000"
        subprocess.run(command.split(), env={**os.environ, **cluster.env}, check=True)
    print(cluster.temp, flush=True)
    time.sleep(120)
"""


def traces(temp: Path) -> list[str]:
    """Every process that knows the folder, by its command line or its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            text = " ".join(process.cmdline()) + " " + " ".join(process.environ().values())
            if str(temp) in text and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
        except psutil.Error:
            continue
    return found


def _wait(condition, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_two_side_by_side_and_nothing_left():
    home = Path.home() / ".ray"
    before = home.exists()
    with LocalCluster(num_cpus=1) as one:
        with LocalCluster(num_cpus=2, env={"LIN_TEST": "two"}) as two:
            for cluster, cpus in ((one, "1.0"), (two, "2.0")):
                code = (
                    "import os, ray; ray.init(); print(int(ray.cluster_resources()['CPU']) * 1.0,"
                    " ray.get(ray.remote(lambda: os.environ.get('LIN_TEST')).remote()))"
                )
                done = subprocess.run(
                    [sys.executable, "-c", code],
                    env={**os.environ, **cluster.env},
                    capture_output=True,
                    text=True,
                )
                assert done.stdout.split() == [cpus, "two" if cluster is two else "None"], done
            assert one.http_port != two.http_port
            _listens_on_loopback_only(one.temp)
        assert not traces(two.temp)
        assert not two.temp.exists()
        assert traces(one.temp)
        assert _status(one) == 200
        assert _status(one, token="0" * 64) in (401, 403)
        with pytest.raises(ZeroDivisionError):
            _fail_inside(one)
    assert not traces(one.temp)
    assert not one.temp.exists()
    assert home.exists() == before


def _fail_inside(cluster: LocalCluster) -> None:
    raise ZeroDivisionError


def _status(cluster: LocalCluster, *, token: str | None = None) -> int:
    request = urllib.request.Request(
        f"{cluster.dashboard}/api/version",
        headers={"Authorization": f"Bearer {token or cluster.token}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def _listens_on_loopback_only(temp: Path) -> None:
    count = 0
    for process in psutil.process_iter():
        try:
            if process.environ().get("LINEARIZED_CLUSTER") != str(temp):
                continue
            sockets = process.net_connections("tcp")
        except psutil.Error:
            continue
        for socket in sockets:
            if socket.status == psutil.CONN_LISTEN:
                count += 1
                assert socket.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1"), process
    assert count > 3


@pytest.mark.parametrize(
    ("how", "job"),
    [
        (signal.SIGINT, ""),
        (signal.SIGKILL, "job"),
        pytest.param(signal.SIGTERM, "job", marks=pytest.mark.slow),  # to Python, as SIGKILL
    ],
)
def test_ends_with_its_owner(how, job, tmp_path):
    out = tmp_path / "out"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with out.open("w") as file:
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, job],
            stdout=file,
            stderr=file,
            env={**os.environ, "PATH": path},
        )
    try:
        _wait(lambda: re.search("^/.*/lin-", out.read_text(), re.M) or owner.poll(), 60)
        temp = Path(out.read_text().split()[-1])
        assert traces(temp)
        if job:
            _wait(lambda: any("sleep 1000" in trace for trace in traces(temp)))
        owner.send_signal(how)
        owner.wait(30)
        _wait(lambda: not traces(temp) and not temp.exists())
    finally:
        owner.kill()
        owner.wait()


def test_head_that_does_not_start_is_explained(tmp_path):
    log = tmp_path / "logs" / "head.log"
    cluster = LocalCluster(num_cpus=-1, log=log)
    with pytest.raises(ClusterError, match="ended with status") as error, cluster:
        pass
    assert "num_cpus" in str(error.value) or "-1" in str(error.value), str(error.value)
    assert log.read_text()
    assert not traces(cluster.temp)
    assert not cluster.temp.exists()


def test_head_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(local, "START_S", 0.5)
    cluster = LocalCluster()
    with pytest.raises(ClusterError, match="did not come up within"), cluster:
        pass
    assert not traces(cluster.temp)
    assert not cluster.temp.exists()
