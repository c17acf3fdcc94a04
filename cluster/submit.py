"""Submits a job to a Ray cluster, here or far away, and follows it to its end.

Knows Ray's job server; knows nothing of what jobs do. All it learns of a job comes over HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import secrets
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cluster.display import Display
from cluster.progress import READ, Event, parse
from linearized.errors import ClusterError, JobError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

TAIL_LINES = 20
SUBMIT_S = 120.0
STOP_S = 20.0

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NOISE = re.compile(r"^(Running entrypoint for job |.* Runtime env is setting up\.$)")


def submit(
    cluster_env: Mapping[str, str],
    entrypoint: list[str],
    *,
    name: str,
    working_dir: Path,
    log: Path,
    on_event: Callable[[Event], None] | None = None,
) -> None:
    """Run `entrypoint` as a job of the cluster that `cluster_env` leads to, until it has ended.

    `working_dir` is uploaded, less what its .gitignore names. Every line that the job prints goes
    to `log`. Events go to `on_event`; without one, a display on standard output shows them.
    JobError if the job does not succeed. Whatever else ends the following, Ctrl-C included, stops
    the job.
    """
    id = f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}-{secrets.token_hex(4)}"
    client = _client(cluster_env)
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(log.open("w"))
        on_event = on_event or stack.enter_context(Display()).show
        follower = _Follower(file, on_event)
        try:
            _upload(cluster_env, entrypoint, name=name, id=id, working_dir=working_dir)
            with warnings.catch_warnings():
                # Ray gives aiohttp ssl=None for "the default", an old way to say so.
                warnings.filterwarnings("ignore", "ssl=None is deprecated", DeprecationWarning)
                status, message = asyncio.run(_follow(client, id, follower))
        except BaseException:
            _stop(client, id)
            raise
        if status != "SUCCEEDED":
            tail = tuple(follower.tail) or tuple(message.splitlines()[-TAIL_LINES:])
            raise JobError(
                f"job {name} {status.lower()}: {_cause(tail, message)} (its log: {log})",
                job=name,
                status=status,
                tail=tail,
            )


class _Follower:
    """What becomes of a job's output."""

    def __init__(self, log: TextIO, on_event: Callable[[Event], None]) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        """The last lines that mean something to a person."""
        self.seen = 0
        """Characters taken in so far."""
        self._log, self._on_event, self._open = log, on_event, ""

    def take(self, text: str) -> None:
        self.seen += len(text)
        *lines, self._open = (self._open + text).split("\n")
        for line in lines:
            self._line(line)

    def close(self) -> None:
        if self._open:
            self._line(self._open)
        self._open = ""

    def _line(self, line: str) -> None:
        self._log.write(line + "\n")
        self._log.flush()
        event = parse(line)
        if event is not None:
            self._on_event(event)
            return
        plain = _COLOUR.sub("", line).rstrip()
        if plain and not _NOISE.match(plain):
            self.tail.append(plain)


async def _follow(client: JobSubmissionClient, id: str, follower: _Follower) -> tuple[str, str]:
    """Take in the job's output until it has ended; returns its status and Ray's message on it."""
    import aiohttp

    lost = 0
    while True:
        # A connection that breaks is made again, and gives the log from its start.
        skip = follower.seen
        try:
            async for text in client.tail_job_logs(id):
                follower.take(text[skip:])
                skip = max(0, skip - len(text))
        except (RuntimeError, OSError, aiohttp.ClientError):
            pass  # whether that was the end, the job's status says
        try:
            info = client.get_job_info(id)
            if info.status.is_terminal():
                # The last lines may have been written after the last look.
                follower.take(client.get_job_logs(id)[follower.seen :])
                follower.close()
                return str(info.status.value), info.message or ""
            lost = 0
        except (RuntimeError, OSError) as error:
            lost += 1
            if lost > 10:
                raise ClusterError(f"lost the cluster while following job {id}: {error}") from error
        await asyncio.sleep(0.5)


def _client(cluster_env: Mapping[str, str]) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    address = cluster_env.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise ClusterError("RAY_API_SERVER_ADDRESS is missing: where is the cluster's job server?")
    token = cluster_env.get("RAY_AUTH_TOKEN")
    if not token and (file := cluster_env.get("RAY_AUTH_TOKEN_PATH")):
        token = Path(file).expanduser().read_text().strip()
    headers = {"Authorization": f"Bearer {token}"} if token else None
    # Ray lets this variable override the address that it is given.
    with _without("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        try:
            return JobSubmissionClient(address, headers=headers)
        except (RuntimeError, OSError) as error:
            raise ClusterError(f"no Ray job server answers at {address}: {error}") from error


def _upload(
    cluster_env: Mapping[str, str], entrypoint: list[str], *, name: str, id: str, working_dir: Path
) -> None:
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "job", "submit", "--no-wait"]
    command += ["--submission-id", id, "--working-dir", str(working_dir), "--log-color", "false"]
    command += ["--runtime-env-json", json.dumps({"env_vars": {READ: "1"}})]
    done = subprocess.run(
        [*command, "--", *entrypoint],
        env={**os.environ, **cluster_env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SUBMIT_S,
        check=False,
    )
    if done.returncode != 0:
        lines = [line for line in _COLOUR.sub("", done.stdout).splitlines() if line.strip()]
        tail = lines[-TAIL_LINES:]
        raise JobError(
            f"job {name} was not taken: {_cause(tail, '')}", job=name, status="REFUSED", tail=tail
        )


def _stop(client: JobSubmissionClient, id: str) -> None:
    """End the job if the cluster knows it, and wait for that. The reason why we stop is being
    raised, so that what goes wrong here must not take its place."""
    deadline = time.monotonic() + STOP_S
    with contextlib.suppress(RuntimeError, OSError):
        client.stop_job(id)
        while not client.get_job_status(id).is_terminal() and time.monotonic() < deadline:
            time.sleep(0.2)


def _cause(tail: Sequence[str], message: str) -> str:
    """The one line that most likely says why."""
    for line in reversed(tail):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    return (tail[-1] if tail else message.split("\n")[0]).strip() or "no reason given"


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """The environment without these variables, for a while."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
