"""The benchmark of distillation: every way to do a step is timed, and gives the same loss."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from jobs import bench_distil, measure


def test_every_way_is_timed(llama, tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path)
    machine = measure.Machine("a processor", (), 1, 2, torch.__version__, 0.0, 1e9, 1e9)
    monkeypatch.setattr(bench_distil.Machine, "measure", lambda device, dtype: machine)
    app = bench_distil.typer.Typer()
    app.command()(bench_distil.main)
    asked = [str(tmp_path), "--row", "80", "--window", "0", "--turns", "1", "--threads", "1"]
    result = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output.splitlines()[-1])
    assert len(found["speeds"]) == 7 and all(speed > 0 for speed in found["speeds"].values())
    assert found["config"]["row"] == 80
    assert "only attention learns" in result.output


def test_every_way_has_the_same_loss(llama, monkeypatch):
    student, teacher = llama(), llama(seed=1)
    linear = bench_distil.student_of(student, bench_distil.LinearConfig.named("anchored"))
    tokens = torch.randint(1, 61, (1, 300))
    losses = []

    def kept(loss):
        def run(*given):
            losses.append(loss(*given))
            return losses[-1]

        return run

    for name in ("loss_from_logits", "loss_from_hidden"):
        monkeypatch.setattr(bench_distil, name, kept(getattr(bench_distil, name)))
    for run in bench_distil._contestants(linear, teacher, tokens).values():
        run()
    assert len(losses) == 6
    for loss in losses[1:]:
        assert float(loss.detach()) == pytest.approx(float(losses[0].detach()), rel=2e-2)
