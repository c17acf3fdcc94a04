"""A run is known again by its settings and by what it is made of."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from jobs.run import Lora, Run, Shape, Stage, Workers
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
    other = replace(run, out=tmp_path / "other")
    assert run.checkpoints("k") != other.checkpoints("k") != other.checkpoints("m")
    assert run.checkpoints("k") == f"{tmp_path}/checkpoints/draft-k"
    far = replace(run, storage="s3://bucket/runs/")
    assert far.absolute().checkpoints("k") == "s3://bucket/runs/draft-k"


def test_where_a_run_lies_and_on_what_it_goes_does_not_matter(run, tmp_path):
    """It is taken up from a checkpoint by its key, maybe elsewhere."""
    key = run.key()
    moved = tmp_path / "moved"
    shutil.copytree(run.data, moved / "data")
    shutil.copytree(run.teacher, moved / "teacher")
    elsewhere = replace(
        run, data=moved / "data", teacher=moved / "teacher", out=moved / "out", storage="s3://x/y"
    )
    assert elsewhere.key() == key == elsewhere.absolute().key()
    more = replace(run, workers=Workers(count=1, cpus=4, zero=3, max_failures=9))
    assert more.key() == key
    [stage] = run.stages
    saving = replace(stage, micro=1, checkpointing=True, checkpoint_every=7)
    assert replace(run, stages=(saving,)).key() == key


@pytest.mark.parametrize(
    "change",
    [
        {"objective": "imitation"}, {"steps": 2}, {"text": 0.1}, {"temperature": 2.0},
        {"context": 8}, {"lora": Lora()}, {"lora": Lora(rank=3)}, {"optim": Optim(lr=2e-3)},
    ],
)  # fmt: skip
def test_what_is_learned_does_matter(run, change):
    [stage] = run.stages
    keys = {replace(run, stages=(replace(stage, **change),)).key(), run.key()}
    assert len(keys) == 2


def test_precision_tells_runs_apart(run):
    workers = [Workers(count=1), Workers(count=1, gpu=True), Workers(count=1, autocast=True)]
    assert len({replace(run, workers=one).key() for one in workers}) == 3


def test_a_worker_goes_through_its_share_in_equal_parts(run):
    stage = replace(run.stages[0], batch=12)
    found = [replace(stage, micro=micro).parts(2) for micro in (None, 1, 2, 3, 6, 100)]
    assert found == [1, 6, 3, 2, 1, 1]
    with pytest.raises(ConfigError, match="micro 4 must divide the 6 blocks of a worker"):
        replace(run, stages=(replace(stage, micro=4),), workers=Workers(count=2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"micro": 0}, "micro must be at least 1"),
        ({"context": 1}, "context must be at least 2"),
        ({"text": 1.5}, "text must be from 0 to 1"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"lora": Lora(), "objective": "medusa"}, "without lora"),
    ],
)
def test_settings_of_a_stage_that_cannot_work_are_named(run, settings, said):
    with pytest.raises(ConfigError, match=said):
        replace(run.stages[0], **settings)
    with pytest.raises(ConfigError, match="lora.rank must be at least 1"):
        Lora(rank=0)


def test_adapters_that_are_not_merged_end_a_run(run):
    [stage] = run.stages
    kept = replace(stage, lora=Lora(merge=False))
    replace(run, stages=(stage, kept))
    with pytest.raises(ConfigError, match="lora.merge=false is for the last stage"):
        replace(run, stages=(kept, stage))


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"key": 3}'])
def test_somebody_elses_run_json_is_a_file_like_others(run, content):
    (run.teacher / "run.json").write_text(content)
    key = run.key()
    (run.teacher / "config.json").write_text("{}")
    assert run.key() != key


def test_a_folder_that_is_not_there(run):
    with pytest.raises(DataError, match="draft: there is no .*other; run the job that makes it"):
        replace(run, data=run.data / "other").key()
