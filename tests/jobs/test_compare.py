"""Runs side by side."""

from __future__ import annotations

import io
import json

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from jobs import compare
from linearized.errors import ConfigError, DataError

RUN = {
    "name": "linearize", "perplexity": {"teacher": 40.0, "before": 200.0, "after": 42.0},
    "parameters": 3_000_000, "tokens": 1_000_000, "seconds": 12.5,
    "losses": [[0, 0, 9.0, 1e-3, 900], [1, 0, 5.0, 1e-3, 1000], [1, 10, 4.25, 1e-4, 1100]],
}  # fmt: skip


def written(folder, **changes):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({**RUN, **changes}))
    return folder


def test_a_table_and_curves(tmp_path):
    old = [[0, 0, 9.0], [0, 10, 6.0]]  # of a run that kept no learning rates
    runs = [
        written(tmp_path / "a" / "target"),
        written(tmp_path / "b" / "target", losses=old, perplexity={"after": 50.0}),
    ]
    scores = {
        "perplexity: wiki": {"teacher": {"perplexity": 10.0}, "model": {"perplexity": 11.5}},
        "task: piqa": {"model": {"accuracy": 0.625, "perplexity": 9.0, "right": "01"}},
        "pass key at 8": {"model": {"right": 0.5, "nats": 1.0}},
    }
    (runs[0] / "evaluation.json").write_text(json.dumps({"scores": scores}))
    said = io.StringIO()
    picture = tmp_path / "out" / "comparison.png"
    found = compare.compare(runs, picture, Console(file=said, width=250))
    assert [row["run"] for row in found] == ["a/target", "b/target"]
    assert found[0]["× teacher"] == 1.05 and found[0]["tokens/s"] == 1000
    assert found[0]["perplexity: wiki"] == 11.5 and found[0]["task: piqa"] == 0.625
    assert found[0]["pass key at 8"] == 0.5
    assert found[1]["× teacher"] is None and found[1]["tokens/s"] is None
    assert found[1]["last loss"] == 6.0
    assert picture.read_bytes().startswith(b"\x89PNG")
    for words in ("a/target", "1.05", "4.25", "3,000,000", "perplexity: before"):
        assert words in said.getvalue()


def test_what_is_no_run_is_named(tmp_path):
    run, console = written(tmp_path / "run"), Console(file=io.StringIO())
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "run.json").write_text('{"losses": [')
    written(tmp_path / "other", losses=None)
    for folder, message in (("gone", "holds no run.json"), ("cut", "is not JSON"),
                            ("other", "has no losses")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            compare.compare([run, tmp_path / folder], tmp_path / "c.png", console)
    with pytest.raises(ConfigError, match="every run must be named once"):
        compare.compare([run, run], tmp_path / "c.png", console)
    with pytest.raises(ConfigError, match="must end in .png or .svg"):
        compare.compare([run], tmp_path / "c.jpeg", console)


def test_as_a_command(tmp_path):
    app = typer.Typer()
    app.command()(compare.main)
    done = CliRunner().invoke(app, [str(tmp_path / "gone")])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and "holds no run.json" in done.stderr
