"""Servers that are measured: ours, and those that people would start instead. Each is started here,
on loopback, and ended. Knows processes; knows nothing of what is measured.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.local import LocalCluster
from jobs.load import Client
from linearized.errors import ClusterError

ROOT = Path(__file__).parents[1]
START_S = 600.0
"""Seconds that a server may take to its first healthy answer; compiling takes minutes."""
STOP_S = 20.0
PAGE = 256
"""Tokens of a page of transformers' cache."""
WITH_USAGE = {"stream_options": {"include_usage": True}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    name: str
    url: str
    model: str
    body: dict[str, Any] = field(default_factory=dict)
    """What every request to it has."""
    process: psutil.Process | None = None
    """Stands still while others have their turns; None: it does nothing then anyway."""
    temp: Path | None = None
    """Of ours: the folder of its cluster."""

    @contextlib.asynccontextmanager
    async def client(self, **more: Any) -> AsyncIterator[Client]:
        """A client for one turn."""
        if self.process is not None:
            self.process.resume()
        try:
            async with Client(self.url, self.model, {**self.body, **more}) as client:
                yield client
        finally:
            if self.process is not None:
                self.process.suspend()

    def targets(self) -> list[psutil.Process]:
        """Of ours: the processes of its target replicas, but for those that load their models."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            name = " ".join(process.info["cmdline"] or [])
            if "ServeReplica" in name and ":target" in name and "__init__" not in name:
                with contextlib.suppress(psutil.NoSuchProcess):
                    parents = " ".join(one for up in process.parents() for one in up.cmdline())
                    found += [process] * (str(self.temp) in parents)
        return found


@contextlib.contextmanager
def ours(target: Path, settings: Sequence[str]) -> Iterator[Server]:
    """The app on a cluster of its own, as users start it.

    Raises:
        ClusterError: it did not start; says why.
    """
    with LocalCluster(num_cpus=max(2, os.cpu_count() or 1)) as cluster:
        env = {**os.environ, **cluster.env}
        serve = [sys.executable, "-m", "ray.serve.scripts"]
        start = ["start", "--http-host", "127.0.0.1", "--http-port", str(cluster.http_port)]
        app = ["run", "--non-blocking", "serve_apps.app:build", f"target={target}", *settings]
        for command in (start, app):
            done = subprocess.run(
                [*serve, *command], env=env, cwd=ROOT, capture_output=True, text=True
            )
            if done.returncode:
                raise ClusterError(f"the app did not start: {done.stderr.strip()[-500:]}")
        url = f"http://127.0.0.1:{cluster.http_port}"
        wait(lambda: httpx.get(f"{url}/health").status_code == 200, "the app")
        yield Server(name="ours", url=url, model=target.name, body=WITH_USAGE, temp=cluster.temp)


@contextlib.contextmanager
def transformers_serve(
    model: Path, threads: int, *, streams: int, context: int
) -> Iterator[Server]:
    """`transformers serve --continuous-batching` on a softmax model, with room for so many texts of
    so many tokens: left to itself it takes more than half of the machine's memory. Its batching
    fixes how the first request is sampled for all.

    Raises:
        ClusterError: it did not start.
    """
    port = _free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    command += ["--continuous-batching", "--device", "cpu", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--log-level", "error"]
    command += ["--cb-num-blocks", str(streams * (2 + context // PAGE))]
    name = "transformers serve"
    with _started(name, command, threads, port) as process:
        yield Server(name=name, url=_url(port), model=str(model), process=process)


@contextlib.contextmanager
def llama_server(
    binary: Path, gguf: Path, threads: int, *, streams: int, context: int
) -> Iterator[Server]:
    """llama.cpp's server, with so many slots of so many tokens each.

    Raises:
        ClusterError: it did not start.
    """
    port = _free_port()
    command = [str(binary), "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--threads", str(threads), "--threads-batch", str(threads)]
    command += ["--parallel", str(streams), "--ctx-size", str(streams * context)]
    with _started("llama.cpp", command, threads, port) as process:
        body = {"cache_prompt": False, **WITH_USAGE}
        yield Server(name="llama.cpp", url=_url(port), model=gguf.stem, body=body, process=process)


def wait(
    condition: Callable[[], bool], what: str, *, alive: Callable[[], bool] | None = None
) -> None:
    """
    Raises:
        ClusterError: the condition does not become true in time, or its process has ended.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if condition():
                return
        if alive is not None and not alive():
            raise ClusterError(f"{what} ended before it was ready")
        time.sleep(0.3)
    raise ClusterError(f"{what} was not ready within {START_S:.0f} s")


@contextlib.contextmanager
def _started(name: str, command: list[str], threads: int, port: int) -> Iterator[psutil.Process]:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = psutil.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            try:
                wait(
                    lambda: httpx.get(f"{_url(port)}/health").status_code == 200,
                    name,
                    alive=lambda: process.poll() is None,
                )
            except ClusterError as error:
                log.seek(0)
                last = log.read().strip().splitlines()[-1:]
                raise ClusterError(f"{error}: {' '.join(last) or 'it says nothing'}") from error
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
                process.terminate()
            try:
                process.wait(STOP_S)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait()


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
