"""How a job says how far it is. Knows events and their lines; knows nothing of who reads them.

    with Progress("finetune", total=300, unit="steps") as progress:
        for step in range(300):
            progress.update(step + 1, loss=loss)

On a terminal this draws a bar, elsewhere it prints a plain line now and then. A process whose
output another of ours reads prints one line an event, which `parse` reads back on the other side:
no logs to be scraped, no files to be shared. Such are Ray's workers, which their driver hears, and
jobs that `cluster.submit` follows.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO, cast

if TYPE_CHECKING:
    from cluster.display import Display

INTERVAL_S = 0.25
"""A stage prints at most one line in this many seconds. Its first and last lines are always
printed."""

READ = "LINEARIZED_EVENTS"
"""The environment variable that says that a process of ours reads this one's output."""

# Ray puts "(RayTrainWorker pid=123) ", coloured or not, before what a worker prints.
_LINE = re.compile(r"^(?:\x1b\[[0-9;]*m)*(?:\([^()]*\))?(?:\x1b\[[0-9;]*m)* ?::(\w+) (.*)$")


@dataclass(frozen=True, kw_only=True)
class Event:
    kind: Literal["progress", "note", "result"]
    stage: str = ""
    state: Literal["running", "done", "failed"] = "running"
    done: float = 0
    total: float | None = None
    """The amount at the end. None means that it is not known."""
    unit: str = ""
    seconds: float = 0.0
    """Seconds since the stage began, by the job's clock."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The last measurements of a progress event, or the result itself of a result event."""
    text: str = ""
    """The text of a note."""

    def line(self) -> str:
        """The event as one line, which `parse` reads back."""
        if self.kind == "note":
            return f"::note {self.text}"
        if self.kind == "result":
            return f"::result {json.dumps(self.values)}"
        names = ("stage", "state", "done", "total", "unit", "seconds", "values")
        return f"::progress {json.dumps({name: getattr(self, name) for name in names})}"


class Progress:
    """Reports the progress of one stage of a job, as a context manager. With `quiet` it prints
    nothing, which is for all ranks but one."""

    def __init__(
        self, stage: str, *, total: float | None = None, unit: str = "", quiet: bool = False
    ) -> None:
        self._stage, self._total, self._unit, self._quiet = stage, total, unit, quiet
        self._done: float = 0
        self._values: dict[str, Any] = {}
        self._began = self._said = time.perf_counter()

    def __enter__(self) -> Self:
        self._began = self._said = time.perf_counter()
        self._say("running")
        return self

    def update(self, done: float, **values: Any) -> None:
        """Report that `done` of `total` is done. `values` are numbers or short strings that are
        shown beside it."""
        self._done = _plain(done)
        self._values.update({name: _plain(value) for name, value in values.items()})
        if time.perf_counter() - self._said >= INTERVAL_S:
            self._say("running")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._say("done" if kind is None else "failed")

    def _say(self, state: Literal["running", "done", "failed"]) -> None:
        if self._quiet:
            return
        self._said = time.perf_counter()
        _emit(
            Event(
                kind="progress",
                stage=self._stage,
                state=state,
                done=self._done,
                total=self._total,
                unit=self._unit,
                seconds=round(self._said - self._began, 3),
                values=dict(self._values),
            )
        )


def note(text: str) -> None:
    """Print one line for the user."""
    _emit(Event(kind="note", text=" ".join(text.split())))


def result(values: Mapping[str, Any]) -> None:
    """Report the job's result, which JSON must be able to hold."""
    _emit(Event(kind="result", values=dict(values)))


def parse(line: str) -> Event | None:
    """The event that a line of a job's log holds; None for every other line."""
    match = _LINE.match(line.rstrip())
    if match is None:
        return None
    kind, rest = match.groups()
    if kind == "note":
        return Event(kind="note", text=rest)
    if kind not in ("progress", "result"):
        return None
    try:
        fields = json.loads(rest)
        return Event(kind="result", values=fields) if kind == "result" else _progress(fields)
    except (ValueError, TypeError):  # a line that was cut, or that only looks like one of ours
        return None


def _progress(fields: Any) -> Event:
    if not isinstance(fields, dict) or "stage" not in fields:
        raise TypeError("not a progress event")
    return Event(kind="progress", **fields)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """For as long as this lasts, events that others' lines on standard output hold, such as those
    of Ray's workers, are shown as this process's own."""
    ear = _Ear(_said())
    try:
        with contextlib.redirect_stdout(ear):
            yield
    finally:
        ear.end()


class _Ear(io.TextIOBase):
    """Standard output, in whose lines events are found."""

    def __init__(self, said: TextIO) -> None:
        self.said = said
        self._begun: dict[int, str] = {}

    def write(self, text: str) -> int:
        # Threads write pieces of lines, each of its own lines.
        thread = threading.get_ident()
        *lines, self._begun[thread] = (self._begun.get(thread, "") + text).split("\n")
        for line in lines:
            self._take(line)
        return len(text)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.said.encoding

    def flush(self) -> None:
        self.said.flush()

    def isatty(self) -> bool:
        return self.said.isatty()

    def fileno(self) -> int:
        return self.said.fileno()

    def end(self) -> None:
        """Say what has not become a line."""
        for rest in filter(None, self._begun.values()):
            self.said.write(rest)
        self._begun.clear()

    def _take(self, line: str) -> None:
        event = parse(line)
        if event is not None:
            _emit(event)
        elif _is_read():
            self.said.write(line + "\n")
        else:
            with _LOCK:
                _display().say(line)


class _Out:
    """What stands behind standard output now, where it is listened to, too."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return _said().write(text)

    def flush(self) -> None:
        _said().flush()

    def isatty(self) -> bool:
        return _said().isatty()

    def fileno(self) -> int:
        return _said().fileno()


def _said() -> TextIO:
    return sys.stdout.said if isinstance(sys.stdout, _Ear) else sys.stdout


def _emit(event: Event) -> None:
    if _is_read():
        # One write, so that lines of several threads do not mix.
        _said().write(event.line() + "\n")
        _said().flush()
    else:
        with _LOCK:
            _display().show(event)


def _is_read() -> bool:
    """Does a process of ours read what this one prints?"""
    if os.environ.get(READ):
        return True
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    return bool(ray.get_runtime_context().worker.mode == ray.WORKER_MODE)


_LOCK = threading.Lock()
"""Of the display: Ray's lines come in a thread of their own."""


@functools.cache
def _display() -> Display:
    """A terminal has one bottom line, so a process has one display."""
    from rich.console import Console

    from cluster.display import Display

    return Display(Console(file=cast(TextIO, _Out()), highlight=False, soft_wrap=True))


def _plain(value: Any) -> Any:
    """Tensors and numpy scalars as what JSON can hold."""
    if isinstance(value, str | bool | int | float):
        return value
    return float(value)
