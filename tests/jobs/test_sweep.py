"""A sweep: a grid of small trainings, what they found kept one by one, claims beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import associations, cli, recall, sentences, sweep, sweep_report, trial
from jobs.grids import GRIDS, PAPER
from jobs.trial import SOFTMAX, Setting, Trial
from linearized.allocation import state_bytes
from linearized.errors import ConfigError, DataError, JobError
from linearized.training.blocks import Document, fill, write_shard


@pytest.fixture
def folder(tmp_path, llama):
    """A softmax model of 61 tokens, and blocks for it."""
    llama(layers=2).save_pretrained(tmp_path / "teacher")
    for split, size in (("train", 1200), ("held_out", 200)):
        ids = np.arange(size, dtype=np.int32) * 7 % 60 + 1
        filled = fill([Document(ids[:50]), Document(ids[50:])], block=24)
        (tmp_path / "data" / split).mkdir(parents=True)
        write_shard(
            tmp_path / "data" / split / "0.arrow", filled, tokenizer="t", source="numbers",
            split=split,
        )  # fmt: skip
    (tmp_path / "data" / "data.json").write_text('{"key": "k"}')
    return tmp_path


SMALL = {"settings": {"group": 4, "taps": 3}, "transfer": 2, "steps": 3, "batch": 2}


def small(folder, *assignments: str) -> sweep.SweepConfig:
    base = [
        f"teacher={folder / 'teacher'}", f"data={folder / 'data'}", f"out={folder / 'out'}",
        *(f"base.{name}={value}" for name, value in SMALL.items()), "seeds=[0]", "eval_blocks=4",
    ]  # fmt: skip
    return cli.override(sweep.variants(), [*base, *assignments])


def test_a_trial_linearizes_trains_and_measures(folder):
    setting = Setting(teacher=folder / "teacher", data=folder / "data", eval_blocks=4)
    anchored = Trial(name="x", attention="anchored", **SMALL)
    found = trial.run(anchored, setting)
    assert [step for step, _ in found["losses"]] == [0, 2]
    assert found["tokens"] == 5 * 2 * 24 and found["state_bytes"] > 0
    assert found["ratio"] == pytest.approx(found["after"] / found["teacher"], abs=1e-4)
    assert {"before", "transferred", "far part off", "convolution off"} <= set(found)
    json.dumps(found)
    softmax = trial.run(Trial(name="s", attention=SOFTMAX, **{**SMALL, "settings": {}}), setting)
    assert softmax["before"] == softmax["teacher"] and softmax["losses"][-1][0] == 4
    assert softmax["tokens"] == found["tokens"] and "far part off" not in softmax
    hybrid = trial.run(replace(anchored, hybrid=4), setting)
    assert hybrid["parameters"] < found["parameters"]


def test_grids_have_the_rows_that_they_claim_about():
    base = Trial(name="base", settings={"group": 16})
    names = {name: [row.name for row in make(base).rows] for name, make in GRIDS.items()}
    for known in names.values():
        assert len(set(known)) == len(known)
    assert len(names["variants"]) == 1 + 2 * 9 + 4
    assert {"softmax", "grouped + conv", "yoso", "anchored, hybrid"} <= set(names["variants"])
    paper = next(row for row in GRIDS["ablations"](base).rows if row.name == PAPER)
    assert (paper.lr, paper.new_lr, paper.transfer, paper.text) == (2e-5, 2e-5, 0, 1.0)
    for name, make in GRIDS.items():
        grid = make(base)
        if grid.accuracy:
            continue
        tokens = {row.transfer + row.steps for row in grid.rows}
        assert len(tokens) == 1, "rows see as many tokens as each other"
        ratios = {row.name: [1.0 + i / 100] for i, row in enumerate(grid.rows)}
        for claim in grid.claims:
            assert "not measured" not in claim.found(ratios), name


def test_claims_say_what_was_not_measured():
    for make in GRIDS.values():
        for claim in make(Trial(name="base", settings={"group": 16})).claims:
            assert claim.found({}) == "not measured"
    grid = GRIDS["sentences"](Trial(name="base", settings={"group": 16}))
    scores = {row.name: [0.5 + i / 100] for i, row in enumerate(grid.rows)}
    assert len(scores) == len(grid.rows) == 3 * 10
    assert grid.claims[2].found(scores).startswith("grouped + conv 79.0%, yoso 78.0%")


def result(name, seed=0, **changes):
    row = Trial(name=name, attention="grouped", seed=seed, settings={"group": 16})
    found = {
        "trial": asdict(row), "teacher": 10.0, "before": 30.0, "transferred": 15.0,
        "after": 11.0, "ratio": 1.1, "score": 1.1, "seconds": 5.0,
        "far part off": 12.0, "convolution off": 13.0,
        "tokens": 1000, "parameters": 100, "state_bytes": 400, "losses": [[0, 3.0], [10, 2.0]],
    }  # fmt: skip
    return {**found, **changes}


def test_what_a_sweep_leaves(tmp_path):
    found = [
        result("grouped + conv"), result("grouped + conv", 1, score=1.2, after=12.0),
        result("grouped", score=1.5), result("rfa", score=1.3), result("rfa + conv", score=1.04),
        result(SOFTMAX, score=0.9, **{"far part off": None, "state_bytes": None}),
    ]  # fmt: skip
    sweep_report.write(found, GRIDS["variants"](Trial(name="base")), "variants", tmp_path)
    table = pq.read_table(tmp_path / "sweep.parquet")
    assert table.num_rows == 6 and table["far_part_off"].null_count == 1
    assert table["settings"][0].as_py() == "group=16"
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    page = (tmp_path / "sweep.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| softmax | 0.900 | 11.000 | 15.000 | – |")
    assert "| grouped + conv | 1.150 ± 0.071 | 11.500 |" in page
    assert "better than it: rfa + conv" in page
    assert "grouped -23.3 %, rfa -20.0 %" in page


def test_trials_that_have_ended_are_not_run_again(folder, monkeypatch, capsys):
    ran = []

    def run(config, trials, setting, shelf):
        ran.append([row.name for row in trials])
        for row in trials[:-1]:
            shelf.put(row, {**result(row.name), "trial": asdict(row)})
        return {"relu, seed 0": "the loss is nan"}

    monkeypatch.setattr(sweep, "_run", run)
    config = small(folder, "only=[softmax, grouped, relu]")
    with pytest.raises(JobError, match="1 of 3 trials failed, the first of them relu, seed 0: the"):
        sweep.main(config)
    assert (folder / "out" / "sweep.md").exists()
    with pytest.raises(JobError):
        sweep.main(config)
    assert ran == [["softmax", "grouped", "relu"], ["relu"]]
    assert "2 of 3 trials have been run before" in capsys.readouterr().out
    with pytest.raises(JobError):
        sweep.main(cli.override(config, ["base.lr=1e-4", "only=[softmax]"]))
    assert ran[-1] == ["softmax"]
    (folder / "data" / "data.json").write_text('{"key": "other"}')
    with pytest.raises(JobError):
        sweep.main(config)
    assert len(ran[-1]) == 3


@pytest.mark.parametrize(
    "assignment,message",
    [
        ("grid=all", "unknown grid 'all'; choose from variants"),
        ("seeds=[1, 1]", "seeds must be different numbers"),
        ("only=[mamba]", "variants has no row 'mamba'; it has softmax"),
        ("base.settings={window: -1}", "window must be an integer"),
        ("base.batch=0", "batch"),
        ("sentences=[a.tsv, b.tsv]", "the grid sentences, and no other, takes sentences"),
        ("eval_blocks=0", "eval_blocks must be at least 1, got 0"),
    ],
)
def test_what_cannot_work_is_named(folder, assignment, message):
    with pytest.raises(ConfigError, match=message):
        small(folder, assignment)


def test_what_is_not_there_is_named(folder):
    with pytest.raises(DataError, match=r"there is no .*gone"):
        sweep.main(small(folder, f"teacher={folder / 'gone'}"))


@pytest.mark.slow
def test_recall_is_measured_at_equal_bytes_of_state(monkeypatch):
    monkeypatch.setattr(associations, "LENGTHS", (64, 96))
    monkeypatch.setattr(associations, "PAIRS", 2)
    rows = {row.name: row for row in GRIDS["recall"](Trial(name="base", state_bytes=80_000)).rows}
    bytes_of = {}
    for name in ("grouped + conv", "performer + conv"):
        config = associations.config_of(rows[name])
        settings = associations.matched(config, rows[name].attention, 80_000)
        model = recall.model_of(replace(config, settings=settings), rows[name].attention)
        bytes_of[name] = state_bytes(model)
    assert all(30_000 < size <= 80_000 for size in bytes_of.values()), bytes_of
    row = replace(rows["grouped + conv"], steps=2, batch=2)
    found = associations.run(row, Setting())
    assert found["state_bytes"] == bytes_of["grouped + conv"]
    assert 0 <= found["at 96"] <= 1 and found["score"] == found["at 64"]
    assert "far part off" in found and found["losses"][-1][0] == 1
    json.dumps(found)
    softmax = associations.run(replace(rows[SOFTMAX], steps=2, batch=2), Setting())
    assert "state_bytes" not in softmax


@pytest.fixture
def tables(tmp_path):
    lines = [
        f"{word} film {i}\t{int(word == 'good')}" for i in range(8) for word in ("good", "bad")
    ]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("shape,steps", [("gpt2", 30), ("t5", 12), ("bert", 12)])
def test_sentences_are_learnt(tables, shape, steps):
    sentences.prepare(tables / "train.tsv", tables / "dev.tsv", tables / "data")
    setting = Setting(data=tables / "data")
    row = Trial(
        name="x", attention="grouped", shape=shape, settings={"group": 4, "taps": 3},
        steps=steps, batch=8, lr=3e-3,
    )  # fmt: skip
    found = sentences.run(row, setting)
    assert found["accuracy"] == found["score"] > 0.9
    assert found["losses"][-1][1] < found["losses"][0][1]
    json.dumps(found)


def test_tables_without_sentences_are_refused(tables):
    (tables / "bad.tsv").write_text("text\tlabel\nfine\t1\n")
    with pytest.raises(DataError, match=r"bad.tsv, line 2: a row has a label from 0"):
        sentences.prepare(tables / "bad.tsv", tables / "dev.tsv", tables / "data")


@pytest.mark.ray
@pytest.mark.slow
def test_ray_tune_runs_the_trials(folder):
    """Two rows by two processes, one of which cannot be trained; then the missing one alone."""
    sweep.main(small(folder, "only=[softmax, grouped + conv]"))
    kept = sorted((folder / "out" / "trials").iterdir())
    assert len(kept) == 2
    found = {one["trial"]["name"]: one for one in (json.loads(x.read_text()) for x in kept)}
    setting = Setting(teacher=folder / "teacher", data=folder / "data", eval_blocks=4)
    want = trial.run(Trial(**found["grouped + conv"]["trial"]), setting)
    assert found["grouped + conv"]["after"] == pytest.approx(want["after"], rel=1e-5)
    times = [x.stat().st_mtime_ns for x in kept]
    with pytest.raises(JobError, match=r"1 of 1 trials failed.*the loss is nan.*lower lr"):
        sweep.main(small(folder, "only=[grouped]", "base.lr=1e30"))
    assert [x.stat().st_mtime_ns for x in kept] == times
