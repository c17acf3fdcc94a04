"""Serves a target and its draft on this machine, on a Ray cluster of its own, until Ctrl-C.

Says what to open and what to send. The models are those of `make demo`, or others.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console

from cluster.local import LocalCluster
from cluster.submit import submit
from jobs import cli
from linearized.errors import ClusterError, ConfigError

ROOT = Path(__file__).resolve().parent.parent
START_S = 180.0
"""Seconds that the app may take to become healthy."""
LOOK_S = 5.0
"""Seconds between two looks at whether it still is."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    run: Path = Path("runs/demo")
    """Folder that `make demo` has made, with target and draft in it."""
    target: Path | None = None
    """Hugging Face folder of the target. null: the one in `run`."""
    draft: Path | None = None
    """Hugging Face folder of the draft. null: the one in `run`, if the target is, too."""
    port: int = 8000
    """Port on which the app answers, at 127.0.0.1."""
    settings: tuple[str, ...] = ()
    """More settings of the app, such as `["rate=60/minute"]`."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 2**16:
            raise ConfigError(f"port must lie between 1 and 65535, got {self.port}")


def demo() -> ServeConfig:
    """What `make demo` has trained."""
    return ServeConfig()


RECIPES = {"demo": demo}


def main(config: ServeConfig) -> None:
    signal.signal(signal.SIGTERM, interrupt)
    console = Console(highlight=False, soft_wrap=True)
    target, draft = models(config)
    _check_free(config.port)
    console.print(f"Starting a local Ray cluster, and on it {target.name}; about a minute")
    try:
        with (
            tempfile.TemporaryDirectory() as logs,
            LocalCluster(num_cpus=max(2, os.cpu_count() or 2)) as cluster,
        ):
            command = start_command(config.port, target, draft, config.settings)
            log = Path(logs) / "serve.log"
            submit(cluster.env, command, name="serve", working_dir=ROOT, log=log)
            wait_until_healthy(config.port)
            console.print(welcome(config.port, target.name, cluster.temp))
            while True:
                time.sleep(LOOK_S)
                cluster.check()
    except KeyboardInterrupt:
        console.print("\nStopped")


def models(config: ServeConfig) -> tuple[Path, Path | None]:
    """Absolute folders of target and draft.

    Raises:
        ConfigError: there is no target.
    """
    target, draft = config.target, config.draft
    if target is None:
        target = config.run / "target"
        draft = draft or config.run / "draft"
        if not (target / "config.json").exists():
            raise ConfigError(
                f"there is no model in {target} yet; run `make demo` first, or name one with "
                "target=FOLDER"
            )
        if config.draft is None and not (draft / "config.json").exists():
            draft = None
    return target.absolute(), draft.absolute() if draft is not None else None


def start_command(
    port: int, target: Path, draft: Path | None, settings: tuple[str, ...] = ()
) -> list[str]:
    """The app is started as users start it, by Ray Serve's own command, which then returns."""
    args = [f"target={target}", *([f"draft={draft}"] if draft is not None else []), *settings]
    start = ["serve", "start", "--http-host", "127.0.0.1", "--http-port", str(port)]
    run = ["serve", "run", "--non-blocking", "serve_apps.app:build", *args]
    return ["bash", "-c", f"{shlex.join(start)} && {shlex.join(run)}"]


def wait_until_healthy(port: int) -> None:
    """
    Raises:
        ClusterError: it takes too long.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise ClusterError(f"the app on port {port} was not healthy within {START_S:.0f} s")


def welcome(port: int, model: str, temp: Path) -> str:
    """What to do with an app that answers."""
    url = f"http://127.0.0.1:{port}"
    body = json.dumps({"model": model, "prompt": "def main():", "max_tokens": 64})
    return f"""
Open   {url}/
Ask    curl {url}/v1/completions -H 'content-type: application/json' -d '{body}'
Watch  Prometheus finds the metrics' addresses in {temp}/prom_metrics_service_discovery.json

Ctrl-C ends it."""


def interrupt(*_: object) -> None:
    """Being ended is Ctrl-C, also where the shell has made SIGINT be ignored."""
    raise KeyboardInterrupt


def _check_free(port: int) -> None:
    """
    Raises:
        ConfigError: somebody else listens there.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"port {port} is taken ({error}); choose another with port="
            ) from None


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__)
