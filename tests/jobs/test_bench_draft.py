"""The benchmark of draft replicas: all cases are measured, and say the same text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import typer
from typer.testing import CliRunner

import linearized
from jobs import bench_draft
from jobs.bench_draft import DEAD, LATE, PLAIN, REPLICA, TURNS, Found, Spent
from linearized.training.blocks import Document, fill, write_shard
from linearized.training.tokenizer import fingerprint


@pytest.fixture
def run(tokenizer, tmp_path) -> Path:
    """A target, a draft and prompts, all at random."""
    for name, layers in (("target", 2), ("draft", 1)):
        torch.manual_seed(layers)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
            num_hidden_layers=layers, num_attention_heads=2, initializer_range=0.2,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        linearized.linearize(model, linearized.LinearConfig(attention="grouped", group=8))
        with torch.no_grad():
            model.lm_head.weight[0] = 0  # the end of text is never the best token
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    ids = np.arange(3200, dtype=np.int32) * 7 % len(tokenizer)
    filled = fill([Document(ids)], block=32)
    (tmp_path / "data" / "held_out").mkdir(parents=True)
    write_shard(
        tmp_path / "data" / "held_out" / "0.arrow", filled,
        tokenizer=fingerprint(tmp_path / "target"), source="numbers", split="held_out",
    )  # fmt: skip
    return tmp_path


def invoke(*options: str):
    app = typer.Typer()
    app.command()(bench_draft.main)
    return CliRunner().invoke(app, list(options))


def test_cases_are_measured_in_turns(run):
    late = next(iter(LATE))
    asked = [option for name in (TURNS, late, DEAD) for option in ("--case", name)]
    done = invoke("--quick", "--run", str(run), "--prompt", "16", *asked)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.splitlines()[-1])
    assert set(record["results"]) == {PLAIN, TURNS, late, DEAD}
    for one in record["results"].values():
        assert one["same_text"] and one["per_token"]["turns"] == 2
        assert one["tokens_a_round"] >= 1 and one["cpu_a_token"] > 0
        assert {"draft", "verify", "commit"} <= set(one["parts_of_a_round"])
    assert record["results"][PLAIN]["drafted"] == 0
    bars = {bar["name"]: bar["value"] for bar in record["bars"]}
    assert bars[f"{DEAD}, × plain"] > 0 and bars["a draft replica, × taking turns"] is None


def test_ratios_are_of_the_same_prompts():
    def found(*seconds: float) -> Found:
        texts = [
            Spent(
                ids=(1,), tokens=10, rounds=5, seconds=one, cpu=one, draft_cpu=0.0,
                parts={"draft": 1.0}, drafted=3, accepted=2,
            )
            for one in seconds
        ]  # fmt: skip
        return Found(texts)

    plain, faster = found(2.0, 8.0), found(1.0, 2.0)
    assert faster.times(plain) == [2.0, 4.0]
    summary = faster.summary(plain)
    assert summary["tokens_a_round"] == 2.0 and summary["parts_of_a_round"] == {"draft": 0.2}
    assert summary["over_plain"]["median"] == 3.0
    (fast, against, *_) = bench_draft._bars({PLAIN: plain, REPLICA: faster, TURNS: plain})
    assert (fast.value, against.value) == (3.0, 3.0)


@pytest.mark.parametrize(
    "option, value", [("--case", "early"), ("--prompt", "9999"), ("--run", "nowhere")]
)
def test_bad_options_are_refused(run, option, value):
    options = ["--quick", "--run", str(run)] if option != "--run" else []
    done = invoke(*options, option, value)
    assert done.exit_code == 2 and value in done.output
