"""Events before the user's eyes: bars on a terminal, plain lines elsewhere.

Knows how an event looks; knows nothing of where it comes from.
"""

from __future__ import annotations

import math
import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from cluster.progress import Event

PLAIN_S = 30.0
"""Seconds of a stage between two of its lines where there are no bars."""


class Display:
    """`show` each event as it comes. Stages that run are bars on a terminal, and elsewhere a line
    now and then; each that ends leaves one line."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def show(self, event: Event) -> None:
        if event.kind == "note":
            self._print(event.text)
        elif event.kind == "result":
            self._print("\n".join(f"{name}: {value}" for name, value in event.values.items()))
        elif event.state == "running":
            self._move(event)
        else:
            self._finish(event)

    def say(self, line: str) -> None:
        """Print a line of somebody else's as it is."""
        text = Text.from_ansi(line)
        (self._bars.console if self._bars else self.console).print(text)

    def close(self) -> None:
        """Take the bars away; what was printed stays."""
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._tasks = None, {}

    def _print(self, text: str) -> None:
        (self._bars.console if self._bars else self.console).print(text, markup=False)

    def _move(self, event: Event) -> None:
        if not self.console.is_terminal:
            last = self._last.setdefault(event.stage, -PLAIN_S)
            if event.seconds - last >= PLAIN_S:
                self._last[event.stage] = event.seconds
                how_far = "" if last < 0 else f"  {_line(event)}"
                self._print(f"  {event.stage} …{how_far}")
            return
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                _Tail(table_column=Column(no_wrap=True, overflow="ellipsis")),
                console=self.console,
                transient=True,
                redirect_stdout=False,  # what others print comes through `say`
            )
            self._bars.start()
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task(f"  {event.stage}", total=event.total)
        self._bars.update(
            self._tasks[event.stage], completed=event.done, total=event.total, event=event
        )

    def _finish(self, event: Event) -> None:
        task = self._tasks.pop(event.stage, None)
        if self._bars is not None and task is not None:
            self._bars.remove_task(task)
            if not self._tasks:
                self.close()
        self._last.pop(event.stage, None)
        mark = "✓" if event.state == "done" else "✗"
        parts = [f"{mark} {event.stage}", f"{event.seconds:.1f} s", _amount(event)]
        self._print("  ".join(part for part in [*parts, _values(event)] if part))


class _Tail(ProgressColumn):
    """Right of the bar: how much, how much longer, and the last measurements."""

    def render(self, task: Task) -> Text:
        event: Event | None = task.fields.get("event")
        if event is None:
            return Text("")
        return Text(_line(event))


def _line(event: Event) -> str:
    """How much, how much longer, and the last measurements."""
    parts = [_amount(event)]
    if event.total and 0 < event.done < event.total:
        left = event.seconds * (event.total - event.done) / event.done
        parts.append(f"{math.ceil(left)} s left")
    return "  ".join(part for part in [*parts, _values(event)] if part)


def _amount(event: Event) -> str:
    if not event.done and event.total is None:
        return ""
    of = "" if event.total is None else f"/{_number(event.total)}"
    return f"{_number(event.done)}{of} {event.unit}".rstrip()


def _values(event: Event) -> str:
    shown = ((name.replace("_", " "), _number(value)) for name, value in event.values.items())
    return "  ".join(f"{name} {value}" for name, value in shown)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
