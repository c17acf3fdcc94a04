"""Events: what a job says is what its reader hears, at a bounded rate."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from cluster import progress
from cluster.display import Display
from cluster.progress import Event, Progress, note, parse, result


@pytest.fixture
def read(monkeypatch):
    """A process of ours reads what this one prints."""
    monkeypatch.setenv(progress.READ, "1")


def _events(text: str) -> list[Event]:
    return [event for line in text.splitlines() if (event := parse(line))]


def test_stage_is_said_from_start_to_end(read, capsys):
    with Progress("finetune", total=3, unit="steps") as bar:
        for step in range(3):
            bar.update(step + 1, loss=1.5 - step)
    events = _events(capsys.readouterr().out)
    assert [event.state for event in events] == ["running", "done"]
    last = events[-1]
    assert (last.stage, last.done, last.total, last.unit) == ("finetune", 3, 3, "steps")
    assert last.values == {"loss": -0.5}
    assert last.seconds >= 0


def test_updates_are_throttled_and_the_last_is_said(read, capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    with Progress("data", unit="files") as bar:
        for done in range(1000):
            now += 0.01  # ten seconds in all
            bar.update(done)
    events = _events(capsys.readouterr().out)
    assert 36 <= len(events) <= 42
    assert events[-1].done == 999
    assert events[-1].total is None


def test_failure_ends_the_stage_and_passes(read, capsys):
    with pytest.raises(ZeroDivisionError), Progress("data"):
        1 / 0  # noqa: B018
    assert _events(capsys.readouterr().out)[-1].state == "failed"


def test_quiet_says_nothing(capsys):
    with Progress("data", quiet=True) as bar:
        bar.update(1)
    assert capsys.readouterr().out == ""


def test_note_and_result(read, capsys):
    note("reused runs/demo/teacher\n  as it is")
    result({"perplexity": {"teacher": 47.1}, "equal": True})
    said, found = _events(capsys.readouterr().out)
    assert said.text == "reused runs/demo/teacher as it is"
    assert found.values == {"perplexity": {"teacher": 47.1}, "equal": True}


def test_tensors_become_numbers(read, capsys):
    torch = pytest.importorskip("torch")
    with Progress("x", total=2) as bar:
        bar.update(torch.tensor(2), loss=torch.tensor(0.5), name="a", bad=float("nan"))
    last = _events(capsys.readouterr().out)[-1]
    assert last.done == 2
    assert last.values["loss"] == 0.5
    assert last.values["name"] == "a"
    assert math.isnan(last.values["bad"])


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "(RayTrainWorker pid=4412) ",
        "(RayTrainWorker pid=4412, ip=10.0.0.7) ",
        "\x1b[36m(RayTrainWorker pid=4412)\x1b[0m ",
    ],
)
def test_ray_prefixes_are_seen_through(prefix):
    event = Event(kind="progress", stage="a (b)", done=1, total=2, values={"loss": 0.5})
    assert parse(prefix + event.line() + "\n") == event
    assert parse(prefix + "::note hello (there)") == Event(kind="note", text="hello (there)")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "loss 3.1",
        "see ::note in the docs",
        "::progress {",
        "::progress []",
        '::progress {"done": 1}',
        '::progress {"stage": "a", "bogus": 1}',
        "::unknown {}",
        '::result {"cut": ',
    ],
)
def test_other_lines_are_no_events(line):
    assert parse(line) is None


@pytest.mark.parametrize("terminal", [True, False])
def test_display_leaves_one_line_a_stage(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    with Display(console) as display:
        for done in (0, 1, 2):
            display.show(Event(kind="progress", stage="data", done=done, total=2, unit="files"))
        display.show(Event(kind="note", text="a [note] on data"))
        display.show(
            Event(kind="progress", stage="data", state="done", done=2, total=2, seconds=1.25)
        )
        display.show(Event(kind="progress", stage="fit", state="failed", values={"loss": 0.12345}))
        display.show(Event(kind="result", values={"perplexity": 47.1}))
    text = out.getvalue()
    assert text.count("✓ data  1.2 s  2/2") == 1
    assert "a [note] on data" in text
    assert "✗ fit  0.0 s  loss 0.1235" in text
    assert "perplexity: 47.1" in text
    if not terminal:
        assert text.count("data …") == 1
        assert "\x1b" not in text


def test_on_a_terminal_there_are_bars_and_no_lines(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    display = Display(Console(file=out, force_terminal=True, width=100))
    monkeypatch.setattr(progress.sys, "stdout", out)
    monkeypatch.setattr(progress, "_display", lambda: display)
    with Progress("data", total=2, unit="files") as bar:
        bar.update(2)
    display.close()
    assert "::progress" not in out.getvalue()
    assert "✓ data" in out.getvalue()


def test_elsewhere_there_are_plain_lines(capsys):
    with Progress("fit", total=4, unit="steps") as bar:
        bar.update(4, loss=0.5)
    note("done")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  fit …" and lines[1].startswith("✓ fit") and lines[2:] == ["done"]
    assert "4/4 steps  loss 0.5" in lines[1]


def test_a_long_stage_says_how_far_it_is_without_a_terminal():
    out = io.StringIO()
    with Display(Console(file=out, width=100)) as display:
        for seconds in range(0, 100, 2):
            display.show(
                Event(kind="progress", stage="fit", done=seconds, total=100, seconds=seconds)
            )
    lines = out.getvalue().splitlines()
    assert lines[0] == "  fit …" and len(lines) == 4
    assert lines[1] == "  fit …  30/100  70 s left"


def test_events_in_what_workers_print_are_shown_and_the_rest_is_left_alone(capsys):
    event = Event(kind="progress", stage="fit", state="done", done=2, total=2, unit="steps")
    with progress.heard():
        print("\x1b[36m(RayTrainWorker pid=7)\x1b[0m " + event.line())
        print("(RayTrainWorker pid=7) a [bracket]")
        print("half", end="")
        note("said here")
    print("after")
    out = capsys.readouterr().out
    assert "::" not in out
    assert "✓ fit  0.0 s  2/2 steps" in out
    assert "(RayTrainWorker pid=7) a [bracket]\n" in out
    assert "said here\n" in out and "half" in out and out.endswith("after\n")


def test_what_is_heard_by_a_process_that_is_read_itself_is_passed_on(read, capsys):
    event = Event(kind="progress", stage="fit", done=2, total=2)
    with progress.heard(), progress.heard():
        print("(RayTrainWorker pid=7) " + event.line())
        print("(RayTrainWorker pid=7) plain")
    out = capsys.readouterr().out.splitlines()
    assert out == [event.line(), "(RayTrainWorker pid=7) plain"]
