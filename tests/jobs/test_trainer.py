"""Training under Ray Train and DeepSpeed: what it leaves, and that it goes on after a loss."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import linearized
from cluster.local import LocalCluster
from jobs import layers
from jobs.run import Run, Shape, Stage, Workers
from jobs.train import fit
from linearized.errors import ConfigError, DataError, LinearizedError
from linearized.medusa import MedusaHeads
from linearized.training.batch import Batch
from linearized.training.blocks import Blocks
from linearized.training.objective import Medusa
from linearized.training.optim import Optim

ROOT = Path(__file__).parent.parent.parent
SHAPE = Shape(hidden=32, layers=2, heads=2, intermediate=64)
LINEAR = linearized.LinearConfig(attention="grouped", group=16, taps=4)


def stage(objective: str, steps: int, **settings) -> Stage:
    return Stage(objective=objective, steps=steps, optim=Optim(lr=5e-3, warmup=2), **settings)


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(num_cpus=2) as running:
        yield running


def train(run: Run, cluster: LocalCluster) -> dict:
    """`fit` in a process of its own: one process knows the token of one cluster only."""
    file = run.out.parent / f"{run.out.name}.pickle"
    file.write_bytes(pickle.dumps(run))
    script = f"""
import pickle
from jobs.train import fit
fit(pickle.load(open({str(file)!r}, "rb")))
"""
    python(cluster, "-c", script)
    return json.loads((run.out / "run.json").read_text())


def python(cluster: LocalCluster, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **cluster.env},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def data(cluster, tmp_path_factory) -> Path:
    """Blocks of 32 tokens of this repository's own sources."""
    out = tmp_path_factory.mktemp("data") / "data"
    settings = [f"source={ROOT / 'linearized'}", f"out={out}", "vocab_size=300", "block=32"]
    python(cluster, "-m", "jobs.data", "demo", *settings, "held_out=0.2")
    return out


@pytest.fixture(scope="module")
def teacher(cluster, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "teacher"
    run = Run(
        name="teacher", data=data, out=out, student=SHAPE, linear=None, teacher=None,
        stages=(stage("next_token", 30),), workers=Workers(), eval_blocks=16,
    )  # fmt: skip
    train(run, cluster)
    return out


def finetune(data: Path, teacher: Path, out: Path, **settings) -> Run:
    return Run(
        name="linearize", data=data, out=out, student=teacher, linear=LINEAR, teacher=teacher,
        stages=(stage("transfer", 10), stage("distillation", 20)), workers=Workers(),
        eval_blocks=16, **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def target(cluster, data, teacher, tmp_path_factory) -> Run:
    run = finetune(data, teacher, tmp_path_factory.mktemp("target") / "target")
    train(run, cluster)
    return run


@pytest.mark.ray
@pytest.mark.timeout(500)
def test_a_linearized_model_comes_out(target):
    run, folder = target, target.out.parent
    done = json.loads((run.out / "run.json").read_text())
    assert done["perplexity"]["after"] < done["perplexity"]["before"]
    transfer = [loss for index, _, loss, *_ in done["losses"] if index == 0]
    assert transfer[-1] < transfer[0]
    model = linearized.load(run.out)
    assert any(p.abs().sum() > 0 for p in linearized.models.new_parameters(model))
    assert linearized.generate(model, [1, 2, 3], max_new_tokens=4, stop_ids=())
    assert (run.out / "tokenizer.json").exists()
    assert not list(folder.glob("*.part"))
    assert not list((folder / "checkpoints").glob("*"))

    before = (run.out / "model.safetensors").stat().st_mtime_ns
    assert fit(run) == done, "a finished run is reused"
    assert (run.out / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.ray
@pytest.mark.timeout(500)
def test_heads_are_trained_and_the_target_is_not(cluster, data, target):
    before = {file.name: file.read_bytes() for file in target.out.glob("*.safetensors")}
    settings = [f"target={target.out}", f"data={data}", "student.count=2", "eval_blocks=16"]
    settings += ["stages.0.steps=40", "stages.0.optim.lr=0.01"]
    python(cluster, "-m", "jobs.finetune", "medusa", *settings)
    done = json.loads((target.out / "medusa" / "run.json").read_text())
    heads = MedusaHeads.from_pretrained(target.out / "medusa")
    untrained = MedusaHeads(heads=2, hidden=32, vocab_size=300, target=heads.target)
    teacher, tokens = linearized.load(target.out), Blocks(data / "train").rows(range(64))
    with torch.no_grad():
        learned, other = (Medusa(x, teacher)(Batch(tokens))[0] for x in (heads, untrained))
        assert learned < other
    assert heads.num_heads == 2 and heads.accuracies == done["accuracies"]
    assert all(0 <= rate <= 1 for row in heads.accuracies for rate in row)
    assert before == {file.name: file.read_bytes() for file in target.out.glob("*.safetensors")}
    model = linearized.load(target.out)
    plain = linearized.generate(model, [1, 2, 3], max_new_tokens=12, stop_ids=())
    settings = {"max_new_tokens": 12, "stop_ids": (), "adaptive": False}
    assert linearized.generate(model, [1, 2, 3], drafter="medusa", **settings) == plain


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_target_is_pruned_to_its_draft(cluster, data, target, tmp_path):
    out = tmp_path / "pruned"
    settings = [f"target={target.out}", f"data={data}", f"out={out}"]
    settings += ["stages.0.steps=40", "stages.0.optim.lr=0.005"]
    cut = ["cut.layers=2", "cut.kv_heads=1", "cut.channels=4", "blocks=8", "eval_blocks=16"]
    python(cluster, "-m", "jobs.finetune", "prune", *settings, *cut)
    done = json.loads((out / "run.json").read_text())
    losses = [loss for _, _, loss, *_ in done["losses"]]
    assert losses[-1] < losses[0]  # it says what the target says
    model, draft = linearized.load(target.out), linearized.load(out)
    assert draft.config.intermediate_size == 4 and draft.config.num_attention_heads == 1
    assert not list(tmp_path.glob("*.cut"))
    settings = {"max_new_tokens": 12, "stop_ids": (), "adaptive": False}
    plain = linearized.generate(model, [1, 2, 3], **settings)
    assert linearized.generate(model, [1, 2, 3], drafter=draft, **settings) == plain


@pytest.mark.ray
def test_layers_are_searched_and_kept(data, target):
    layers.main(layers.LayersConfig(target=target.out, data=data, blocks=4))
    found = json.loads((target.out / "layers.json").read_text())
    assert set(found["layers"]) <= {0, 1} and found["speed"] >= 1
    model = linearized.load(target.out)
    settings = {"max_new_tokens": 12, "stop_ids": (), "adaptive": False}
    plain = linearized.generate(model, [1, 2, 3], **settings)
    assert linearized.generate(model, [1, 2, 3], drafter="layers", **settings) == plain


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return linearized.load(folder).state_dict()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_every_zero_stage_trains_the_same_model(cluster, data, teacher, tmp_path, zero):
    want = finetune(data, teacher, tmp_path / "two")
    train(want, cluster)
    other = finetune(data, teacher, tmp_path / "other")
    other = replace(other, workers=Workers(zero=zero))
    train(other, cluster)
    for name, tensor in weights(want.out).items():
        assert torch.allclose(tensor, weights(other.out)[name], atol=2e-4), name


@pytest.mark.ray
@pytest.mark.timeout(500)
def test_autocast_changes_the_products_and_not_the_weights_type(cluster, data, target, tmp_path):
    """In bfloat16 the losses are other ones, and close: within 5 %, on every kind of processor."""
    run = replace(target, out=tmp_path / "autocast", workers=Workers(autocast=True))
    found = train(run, cluster)["losses"]
    want = json.loads((target.out / "run.json").read_text())["losses"]
    assert found != want
    assert [x[2] for x in found] == pytest.approx([x[2] for x in want], rel=0.05)
    assert {tensor.dtype for tensor in weights(run.out).values()} == {torch.float32}


def test_a_run_does_not_delete_what_it_reads(tmp_path):
    (tmp_path / "kept").write_text("weights")
    run = finetune(tmp_path / "data", tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="would replace .*; choose another out"):
        fit(replace(run, fresh=True))
    assert (tmp_path / "kept").read_text() == "weights"


def test_settings_that_cannot_work_are_named(tmp_path):
    with pytest.raises(ConfigError, match="zero must be.*7"):
        Workers(zero=7)
    with pytest.raises(ConfigError, match="autocast is for CPUs"):
        Workers(gpu=True, autocast=True)
    with pytest.raises(ConfigError, match="steps must be.*0"):
        stage("next_token", 0)
    with pytest.raises(ConfigError, match="hidden=30"):
        Shape(hidden=30, layers=1, heads=2, intermediate=8)
    with pytest.raises(DataError, match="nowhere"):
        fit(finetune(tmp_path / "nowhere", tmp_path, tmp_path / "out"))
    with pytest.raises(
        LinearizedError, match="softmx.*distillation, imitation, medusa, next_token, transfer"
    ):
        stage("softmx", 5)
    with pytest.raises(ConfigError, match="batch 5.*2 workers"):
        finetune(tmp_path, tmp_path, tmp_path, seed=0).__class__(
            name="x", data=tmp_path, out=tmp_path, student=SHAPE, linear=None, teacher=None,
            stages=(stage("next_token", 5, batch=5),), workers=Workers(),
        )  # fmt: skip
