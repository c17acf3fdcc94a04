"""What a run would take: counts are those of the model itself, memory follows ZeRO's stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import linearized
from jobs import plan
from jobs.cli import configured
from jobs.recipes import RECIPES
from jobs.run import Lora, Run, Workers
from linearized.errors import DataError, ModelError


@pytest.fixture
def run(pair, tmp_path) -> Run:
    """The conftest's teacher, to be linearized."""
    words = ["adapt", f"model={pair / 'teacher'}", f"data={tmp_path}", f"out={tmp_path / 'out'}"]
    return configured(RECIPES, words)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(plan, "PRODUCT_S", 0.01)


def test_counts_are_those_of_the_model(run, pair):
    teacher = linearized.load(pair / "teacher")
    size = plan.size_of(teacher)
    assert size.all == sum(p.numel() for p in teacher.parameters())
    layer = 4 * 32 * 32 + 3 * 32 * 64
    assert (size.matrices, size.attention, size.new) == (3 * layer, 3 * 4 * 32 * 32, 0)
    assert size.low_rank == 3 * (4 * (32 + 32) + 3 * (32 + 64))
    linearized.linearize(teacher, run.linear)
    linear = plan._student(run, size, [])
    assert linear == plan.size_of(teacher) and linear.new > 0


def test_zero_shares_out_more_from_stage_to_stage(run):
    size = plan.size_of(linearized.load(run.student))
    run = replace(run, workers=Workers(count=4, gpu=True))
    found = [plan.memory(run, zero, 128, size, size) for zero in range(4)]
    alls = [sum(one.values()) for one in found]
    assert alls == sorted(alls, reverse=True) and len(set(alls)) == 4
    assert found[3]["weights"] * 4 == found[2]["weights"] == size.all * 2
    assert found[0]["optimizer"] == 6 * found[0]["gradients"]


def test_low_rank_changes_and_checkpointing_take_less(run):
    size = plan.size_of(linearized.load(run.student))
    stage = replace(run.stages[1], micro=1, trained="all")

    def bytes_of(**settings) -> dict[str, float]:
        return plan.memory(replace(run, stages=(replace(stage, **settings),)), 0, 128, size, size)

    assert bytes_of(lora=Lora(rank=1))["optimizer"] < bytes_of()["optimizer"]
    assert bytes_of(trained="layers")["optimizer"] < bytes_of()["optimizer"]
    assert bytes_of(checkpointing=True)["activations"] < bytes_of()["activations"]
    assert bytes_of(micro=2)["activations"] == 2 * bytes_of()["activations"]
    assert plan.operations(replace(stage, checkpointing=True), size, size) > plan.operations(
        stage, size, size
    )


@pytest.mark.parametrize("name", ["demo", "draft", "medusa", "prune", "pretrain", "flash"])
def test_a_plan_is_shown_and_nothing_made(name, pair, tmp_path, capsys):
    which = {"demo": "model", "draft": "target", "medusa": "target", "prune": "target"}
    words = [name, f"data={tmp_path / 'data'}", f"out={tmp_path / 'out'}", "stages.0.batch=8"]
    if name in which:
        words.append(f"{which[name]}={pair / ('teacher' if name == 'demo' else 'target')}")
    plan.show(configured(RECIPES, words))
    out = capsys.readouterr().out
    assert "blocks of 4,096 tokens are assumed" in out
    assert f"out: {tmp_path / 'out'}" in out and "objective: " in out
    assert "(this run)" in out and "an estimate" in out
    assert ("is cut out of" in out) == (name == "prune")
    assert list(tmp_path.iterdir()) == []


def test_a_paper_model_on_gpus_that_are_not_here(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan.show(configured(RECIPES, ["llama2_7b", f"model={pair / 'teacher'}"]))
    out = capsys.readouterr().out
    assert "each GPU assumed; there is none here" in out
    assert "16.38M" in out, "tokens of the transfer, in blocks of 4,096"


def test_what_is_not_there_is_named(run, tmp_path):
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(DataError, match="data.json is not of jobs.data"):
        plan.show(run)
    with pytest.raises(ModelError, match="cannot make a model of /no/where"):
        plan.show(replace(run, data=Path("/no"), teacher=Path("/no/where")))
