"""Keeps a process tree only as long as its owner lives. Knows processes; knows nothing of Ray.

Run as its own program, `python keeper.py FOLDER LOG -- command …`, with a pipe as its input. The
owner holds the other end. When the pipe closes, because the owner said so, failed, or was killed,
the command and all that descends from it end, and FOLDER is removed. So there is one way to stop,
and it does not need the owner to be well.

Descendants are known by an environment variable that holds FOLDER's path: it survives setsid,
double forks and the death of parents, where process groups and parent links do not.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

MARKER = "LINEARIZED_CLUSTER"
"""Environment variable that holds the folder's path in every process that belongs to it."""
GRACE_S = 4.0
"""How long the command may take to end its tree by itself. An idle Ray head needs three seconds;
one with a running job waits for that job until it is killed."""


def keep(folder: Path, log: Path, command: Sequence[str]) -> int:
    """Run the command until standard input closes; returns its exit status, 0 if it was stopped."""
    owner = os.getppid()
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, MARKER: str(folder)},
            start_new_session=True,
        )
    while child.poll() is None and not _owner_gone(owner):
        pass
    if child.poll() is not None:
        end(folder)
        # The folder stays: it says why, and the owner, who is told by our exit, removes it.
        return child.returncode or 1
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_S)
    end(folder)
    child.wait()
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def members(folder: Path) -> list[psutil.Process]:
    """All live processes that belong to this folder."""
    found = []
    for process in psutil.process_iter():
        # Another user's process, or one that has just ended, is not ours.
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARKER) == str(folder):
                found.append(process)
    return found


def end(folder: Path) -> None:
    """Stop what is left of the tree: ask, then kill until nothing is there."""
    for round in range(50):
        left = members(folder)
        if not left:
            return
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGTERM if round == 0 else signal.SIGKILL)
        psutil.wait_procs(left, timeout=1.0 if round == 0 else 0.2)


def _owner_gone(owner: int) -> bool:
    """Wait up to half a second for the pipe to close. The parent is looked at as well: a process
    that the owner forked may hold the pipe open after the owner has died."""
    readable, _, _ = select.select([sys.stdin], [], [], 0.5)
    return bool(readable) or os.getppid() != owner


if __name__ == "__main__":
    at = sys.argv.index("--")
    sys.exit(keep(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[at + 1 :]))
