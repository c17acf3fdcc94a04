"""A Ray cluster of one node on this machine, for the demo and the tests.

Knows how to start one beside others, how to reach it, and that nothing of it stays. Knows nothing
of jobs.

    with LocalCluster() as cluster:
        subprocess.run(["ray", "status"], env={**os.environ, **cluster.env})
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster import keeper
from linearized.errors import ClusterError

START_S = 90.0
"""Seconds that the head may take to answer."""
STOP_S = 30.0

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS_ALLOW_REGEX": "^::",  # progress and notes are never held back
    "RAY_worker_niceness": "0",  # with 15, Ray's own, workers starve beside anything else
    "NO_COLOR": "1",
}
# Ray replaces 127.0.0.1 by the address of the first network interface, and then listens there,
# unless it believes that nodes cannot be joined.
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class LocalCluster:
    """A head node with its own ports, token and folder, from `__enter__` to `__exit__`.

    It also ends when this process ends, however that happens: see `cluster.keeper`.
    """

    address: str
    """Address of the cluster, for `ray.init`."""
    dashboard: str
    """Address of the dashboard, to which jobs are submitted."""
    http_port: int
    """A free port for Serve's HTTP proxy."""
    token: str
    temp: Path
    log: Path
    env: dict[str, str]
    """Environment variables with which a driver or a `ray` command reaches this cluster."""

    def __init__(
        self,
        *,
        num_cpus: int | None = None,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """`env` is what every process of the cluster finds in its environment. `log` is a file for
        the head's own output; by default it goes with the cluster's folder."""
        self._num_cpus = num_cpus
        self._extra = dict(env or {})
        self._log = log
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        # Sockets below it may have paths of 107 bytes only, so it cannot lie in the repository.
        self.temp = Path(tempfile.mkdtemp(prefix="lin-"))
        self.log = self._log or self.temp / "head.log"
        self.token = secrets.token_hex(32)
        gcs, dashboard, client, agent, self.http_port, *metrics = _free_ports(7)
        self.address = f"127.0.0.1:{gcs}"
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.env = {
            **_QUIET,
            **_LOOPBACK,
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
        }
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_text("")  # what an earlier head said there would be taken for this one's
            self._start(
                f"--port={gcs}",
                f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={client}",
                f"--dashboard-agent-listen-port={agent}",
                metrics=metrics,
            )
            self._wait_until_up()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def check(self) -> None:
        """
        Raises:
            ClusterError: the head has ended.
        """
        status = self._keeper.poll() if self._keeper is not None else None
        if status is not None:
            raise ClusterError(f"the Ray head ended with status {status}{self._last_words()}")

    def _start(self, *ports: str, metrics: Sequence[int]) -> None:
        command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", *ports]
        command += [f"--temp-dir={self.temp}", "--include-dashboard=true"]
        command += ["--disable-usage-stats", "--log-style=record", "--log-color=false"]
        if self._num_cpus is not None:
            command.append(f"--num-cpus={self._num_cpus}")
        # Jobs say `python` and mean the one that has this project.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        env = {**os.environ, "PATH": path, **self._extra, **self.env}
        del env["RAY_ADDRESS"], env["RAY_API_SERVER_ADDRESS"]  # the head is the one addressed
        # Ray's own processes leave temporary folders behind when they are killed.
        env["TMPDIR"] = str(self.temp / "tmp")
        (self.temp / "tmp").mkdir()
        # These two ports have no option, and a fixed default that a second cluster could not have.
        env["AUTOSCALER_METRIC_PORT"], env["DASHBOARD_METRIC_PORT"] = map(str, metrics)
        self._keeper = subprocess.Popen(
            [sys.executable, "-P", keeper.__file__, str(self.temp), str(self.log), "--", *command],
            stdin=subprocess.PIPE,
            env=env,
            start_new_session=True,  # Ctrl-C is for the owner, which then closes the pipe
        )

    def _wait_until_up(self) -> None:
        assert self._keeper is not None
        deadline = time.monotonic() + START_S
        while not self._answers():
            self.check()
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the Ray head did not come up within {START_S:.0f} s{self._last_words()}"
                )
            time.sleep(0.1)

    def _answers(self) -> bool:
        """Whether the head has said that all of it runs, and the job server answers."""
        if "Ray runtime started" not in _text(self.log):
            return False
        request = urllib.request.Request(
            f"{self.dashboard}/api/version", headers={"Authorization": f"Bearer {self.token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _stop(self) -> None:
        if self._keeper is None:
            shutil.rmtree(self.temp, ignore_errors=True)
            return
        process, self._keeper = self._keeper, None
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        if self.temp.exists():  # the head ended by itself, or the keeper was killed
            process.kill()
            process.wait()
            keeper.end(self.temp)
            shutil.rmtree(self.temp, ignore_errors=True)

    def _last_words(self) -> str:
        lines = [line for line in _text(self.log).splitlines() if line.strip()][-10:]
        return "".join(f"\n  {line}" for line in lines)


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, from below the range that the system hands out by itself, so
    that no outgoing connection takes one before its use."""
    found: list[int] = []
    candidates = random.SystemRandom().sample(range(20000, 32000), 2000)
    for port in candidates:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise ClusterError("no free TCP ports between 20000 and 32000 on this machine")
