"""A run is known again by its settings and by what it is made of."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from jobs.run import Run, Shape, Stage, Workers
from linearized.errors import ConfigError, DataError
from linearized.training.optim import Optim


@pytest.fixture
def run(tmp_path):
    for name, file in (("data", "data.json"), ("teacher", "run.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps({"key": name, "seconds": 1}))
    return Run(
        name="draft",
        data=tmp_path / "data",
        out=tmp_path / "draft",
        student=Shape(hidden=8, layers=1, heads=1, intermediate=8),
        linear=None,
        teacher=tmp_path / "teacher",
        stages=(Stage(objective="distillation", steps=1, batch=1, optim=Optim(lr=1e-3)),),
        workers=Workers(count=1),
    )


def test_settings_and_inputs_tell_runs_apart(run):
    key = run.key()
    assert replace(run, fresh=True).key() == key
    assert replace(run, seed=7).key() != key
    (run.teacher / "run.json").write_text(json.dumps({"key": "another"}))
    assert run.key() != key


def test_what_is_put_beside_a_model_does_not(run):
    key = run.key()
    (run.teacher / "layers.json").write_text("{}")
    (run.teacher / "run.json").write_text(json.dumps({"key": "teacher", "seconds": 2}))
    assert run.key() == key


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "new.json"])
def test_every_file_of_a_model_that_we_have_not_made_does(run, file):
    (run.teacher / "run.json").unlink()
    (run.teacher / "config.json").write_text("{}")
    (run.teacher / "model.safetensors").write_bytes(b"12")
    key = run.key()
    (run.teacher / file).write_text("longer")
    assert run.key() != key


def test_layers_beside_somebody_elses_model_are_none(run):
    (run.teacher / "run.json").unlink()
    (run.teacher / "config.json").write_text("{}")
    key = run.key()
    (run.teacher / "layers.json").write_text("{}")
    assert run.key() == key


def test_nothing_that_it_reads_is_overwritten(run, tmp_path):
    (tmp_path / "link").symlink_to(run.teacher)
    for out in (run.teacher, run.data, tmp_path, tmp_path / "link", run.data / ".." / "teacher"):
        with pytest.raises(ConfigError, match="would replace .*, which draft reads"):
            replace(run, out=out).check_out()
    replace(run, out=run.teacher / "medusa").check_out()
    run.check_out()


def test_nothing_of_somebody_else_is_overwritten(run):
    run.out.mkdir()
    run.check_out()
    (run.out / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="draft exists and is not this job's"):
        run.check_out()
    (run.out / "run.json").write_text("{}")
    run.check_out()


def test_runs_side_by_side_keep_their_checkpoints_apart(run, tmp_path):
    assert run.storage != replace(run, out=tmp_path / "other").storage


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"key": 3}'])
def test_somebody_elses_run_json_is_a_file_like_others(run, content):
    (run.teacher / "run.json").write_text(content)
    key = run.key()
    (run.teacher / "config.json").write_text("{}")
    assert run.key() != key


def test_a_folder_that_is_not_there(run):
    with pytest.raises(DataError, match="draft: there is no .*other; run the job that makes it"):
        replace(run, data=run.data / "other").key()
