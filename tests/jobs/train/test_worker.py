"""What workers of a run do together: the same, whatever their number, ZeRO stage and fate."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers

import linearized
from jobs.run import Lora, Run, Workers
from jobs.train import checkpoints
from linearized.models import new_parameters

KILLED = """
import os, signal
from jobs.train.checkpoints import Writer
from jobs.train.engine import Engine
save, step, count = Writer.save, Engine.step, []
def save_and_wait(self, *arguments):
    save(self, *arguments)
    self.wait()
Writer.save = save_and_wait
def until(self, *arguments):
    count.append(1)
    if len(count) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)
Engine.step = until
"""
"""A rank that is killed before it takes this step, counted from 1."""


def report(run: Run) -> dict:
    return json.loads((run.out / "run.json").read_text())


def losses(run: Run) -> list[float]:
    return [loss for _, _, loss, *_ in report(run)["losses"]]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return linearized.load(run.out).state_dict()


def on(run: Run, count: int, zero: int, out: str) -> Run:
    return replace(run, out=run.out.with_name(out), workers=Workers(count=count, zero=zero))


def close(run: Run, other: Run, atol: float) -> None:
    found = weights(other)
    for name, tensor in weights(run).items():
        assert torch.allclose(tensor, found[name], atol=atol, rtol=0), name


def test_a_killed_run_goes_on_as_if_nothing_had_been(run, go):
    whole = on(run, 1, 0, "whole")
    assert go(whole) == [0]
    for zero in (0, 2):
        cut = on(run, 1, zero, f"cut-{zero}")
        assert go(cut, before=KILLED.format(step=7)) == [-9]
        at = checkpoints.latest(cut.checkpoints(cut.key()))[0].position
        assert (at.stage, at.step) == (1, 2) and not cut.out.exists()
        again = replace(cut, workers=Workers(count=1, zero=0))
        assert go(again) == [0]
        assert losses(again) == pytest.approx(losses(whole), abs=1e-4 if zero else 0)
        close(whole, again, 1e-4 if zero else 0)
        assert report(again)["perplexity"] == pytest.approx(report(whole)["perplexity"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_run_is_taken_up_by_any_number_of_workers_and_zero_stage(run, go, zero):
    """deepspeedai/DeepSpeed#7546, #7601, #6691, #7200: a universal checkpoint had rank 0's states
    only, its loss jumped, it started from scratch, or stage 0 was refused."""
    whole = on(run, 1, 0, "whole")
    assert go(whole) == [0]
    for count, others in ((1, (2, 4)), (2, (1,)), (4, (2,))):
        for other in others:
            for stage in {0, 2, 3} - ({zero} if (count, other) != (1, 2) else set()):
                cut = on(run, count, zero, f"{zero}-{count}-{stage}-{other}")
                assert set(go(cut, before=KILLED.format(step=7))) != {0}
                again = replace(cut, workers=Workers(count=other, zero=stage))
                assert go(again) == [0] * other
                assert losses(again) == pytest.approx(losses(whole), abs=1e-4)
                close(whole, again, 1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_on_two_workers_trains_as_one_without(run, go, zero):
    one, two = on(run, 1, 0, "one"), on(run, 2, zero, "two")
    assert go(one) == [0] and go(two) == [0, 0]
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    close(one, two, 1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("settings", [{"micro": 1}, {"micro": 2}, {"checkpointing": True}])
@pytest.mark.parametrize("zero", [0, 3])
def test_what_saves_memory_changes_nothing(run, go, settings, zero):
    plain = on(run, 1, zero, "plain")
    changed = replace(plain, out=run.out.with_name("changed"),
                      stages=tuple(replace(stage, **settings) for stage in run.stages))  # fmt: skip
    assert changed.key() == plain.key()
    assert go(plain) == go(changed) == [0]
    assert losses(changed) == pytest.approx(losses(plain), abs=1e-4)
    close(plain, changed, 1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stage_may_read_the_beginning_of_blocks_only(run, go):
    short = replace(run, stages=(replace(run.stages[0], context=8), run.stages[1]))
    assert go(run) == [0]
    tokens = report(run)["tokens"]
    assert go(replace(short, out=run.out.with_name("short"))) == [0]
    found = json.loads((run.out.with_name("short") / "run.json").read_text())
    assert found["tokens"] == tokens - 4 * 4 * (24 - 8)


POISONED = """
from linearized.training.objective import Objective
forward, count = Objective.summed, []
from linearized.training import objective as module
summed = module.Distillation.summed
def poisoned(self, batch):
    count.append(1)
    return summed(self, batch) * (float("nan") if len(count) in {steps} else 1.0)
module.Distillation.summed = poisoned
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_loss_that_is_no_number_costs_its_step_only(run, go, zero):
    bad = on(run, 1, zero, "bad")
    assert go(bad, before=POISONED.format(steps=[2])) == [0]
    assert report(bad)["left_out"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in weights(bad).values())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_adapters_are_merged_into_the_result(run, go):
    pytest.importorskip("peft")
    stages = tuple(replace(stage, lora=Lora(rank=2)) for stage in run.stages)
    merged = replace(run, stages=stages)
    assert go(merged) == [0]
    before = linearized.load(run.teacher).state_dict()
    after = weights(merged)
    assert not any("lora" in name for name in after)
    q = "model.layers.0.self_attn.q_proj.weight"
    assert torch.linalg.matrix_rank(after[q] - before[q], atol=1e-5) in (1, 2, 3, 4)
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(after[embeddings], before[embeddings])
    assert all(p.abs().sum() > 0 for p in new_parameters(linearized.load(merged.out)))
    assert losses(merged)[-1] < losses(merged)[4]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("zero", [0, 3])
def test_a_run_with_adapters_is_taken_up_too(run, go, zero):
    """deepspeedai/DeepSpeed#6771: frozen parameters left a partial optimizer state, which could not
    be read again; #7669: shapes of 0."""
    pytest.importorskip("peft")
    stages = (run.stages[0], replace(run.stages[1], lora=Lora(rank=2)))
    whole = replace(on(run, 1, 0, "whole"), stages=stages)
    cut = replace(on(run, 1, zero, "cut"), stages=stages)
    assert go(whole) == [0]
    assert go(cut, before=KILLED.format(step=7)) == [-9]
    assert go(cut) == [0]
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-4)
    close(whole, cut, 1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_may_be_left_beside_the_weights(run, go):
    peft = pytest.importorskip("peft")
    stages = (run.stages[0], replace(run.stages[1], lora=Lora(rank=2, merge=False)))
    beside = replace(on(run, 1, 0, "beside"), stages=stages)
    merged = replace(run, stages=(stages[0], replace(stages[1], lora=Lora(rank=2))))
    assert go(beside) == go(merged) == [0]
    tokens = torch.arange(3, 20)[None]
    model = linearized.load(beside.out)
    with torch.no_grad():
        plain = model(input_ids=tokens, use_cache=False).logits
        want = linearized.load(merged.out)(input_ids=tokens, use_cache=False).logits
        tuned = peft.PeftModel.from_pretrained(model, beside.out / "adapter")
        found = tuned(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(found, want, atol=1e-4) and not torch.allclose(plain, want, atol=1e-2)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("zero", [0, 3])
def test_tied_weights_are_written_once_and_stay_tied(run, go, zero):
    """deepspeedai/DeepSpeed#8376, hiyouga/LlamaFactory#10813, OpenRLHF#1316."""
    tied = on(run, 2, zero, "tied")
    assert go(tied) == [0, 0]
    from safetensors import safe_open

    with safe_open(tied.out / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert all(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    model = transformers.AutoModelForCausalLM.from_pretrained(tied.out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
