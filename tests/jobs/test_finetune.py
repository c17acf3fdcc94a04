"""The one entry of training: what recipes return, in which order it is done, and what is listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import __main__ as listing
from jobs import finetune, pruning
from jobs.cli import configured, describe
from jobs.pruning import Pruning
from jobs.recipes import RECIPES
from jobs.run import Heads, Run
from linearized.errors import ModelError


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_run_or_ends_with_one(name):
    made = RECIPES[name]()
    run = made[-1] if isinstance(made, list) else made
    assert isinstance(run, Run)
    assert (run.teacher is not None) == any(stage.objective != "next_token" for stage in run.stages)
    first = (RECIPES[name].__doc__ or "").partition("\n")[0]
    assert first.endswith("."), "a sentence on one line, for --help"


def test_recipes_are_told_by_their_first_line():
    text = describe(RECIPES, finetune.__doc__)
    assert all(f"  {name} " in text for name in RECIPES)


def test_a_model_is_teacher_and_student(tmp_path):
    run = configured(RECIPES, ["demo", "model=/m", "data=/d", "stages.distillation.steps=3"])
    assert run.student == run.teacher == Path("/m") and run.data == Path("/d")
    assert [stage.steps for stage in run.stages] == [50, 3]
    other = configured(RECIPES, ["demo", "attention=grouped", "linear.group=16"])
    assert (other.linear.attention, other.linear.group, other.linear.window) == ("grouped", 16, 0)


def test_heads_lie_beside_their_target():
    run = configured(RECIPES, ["medusa", "target=/m", "student.count=2"])
    assert run.out == Path("/m/medusa") and run.student == Heads(count=2)


def test_steps_are_done_in_order_and_what_they_left_goes(monkeypatch):
    done = []
    monkeypatch.setattr(pruning, "prune", lambda step: done.append(("cut", step.out)))
    monkeypatch.setattr(pruning, "clear", lambda step: done.append(("clear", step.out)))
    monkeypatch.setattr(finetune, "fit", lambda run: done.append(("fit", run.student)))
    monkeypatch.setattr(finetune, "with_folders", lambda run: run)
    steps = configured(RECIPES, ["prune", "out=/o/half", "cut.layers=1", "seed=9"])
    finetune.main(steps)
    cut = Path("/o/half.cut")
    assert done == [("cut", cut), ("fit", cut), ("clear", cut)]
    assert isinstance(steps[0], Pruning) and steps[0].cut.layers == 1
    assert (steps[1].out, steps[1].seed) == (Path("/o/half"), 9)


def test_models_become_folders_beside_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.models.folder_of", lambda model, cache: cache / f"{model}")
    run = finetune.with_folders(configured(RECIPES, ["demo", "model=a/b", f"out={tmp_path}/t"]))
    assert run.student == run.teacher == tmp_path / "models" / "a/b"
    monkeypatch.undo()
    with pytest.raises(ModelError, match="there is no model at /no/where"):
        finetune.with_folders(configured(RECIPES, ["demo", "model=/no/where"]))
    finetune.with_folders(configured(RECIPES, ["pretrain"]))


def test_all_jobs_are_listed(capsys):
    listing.main()
    lines = capsys.readouterr().out.splitlines()
    assert {"data", "finetune", "demo", "serve"} <= set(listing.jobs())
    assert not {"run", "models", "storage", "cli"} & set(listing.jobs())
    assert all(len(line) <= 120 for line in lines)
