"""Every backend computes the same model: read, decode, verify, commit, generate."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import linearized
from linearized.models import linear_modules

STEPS = ["extend 1", "extend 32", "extend 33", "verify", "commit", "generate"]


@torch.no_grad()
def used(model, step: str) -> dict[str, torch.Tensor]:
    """What one verb of decoding gives, and the logits that follow it."""
    tokens = torch.arange(2 * 60).view(2, 60) * 7 % 58 + 3
    state = linearized.new_state(model, batch_size=2)
    found = {}
    if step.startswith("extend"):
        size = int(step.split()[1])
        linearized.extend(model, tokens[:, :5], state)
        found["extended"] = linearized.extend(model, tokens[:, 5 : 5 + size], state)
    elif step in ("verify", "commit"):
        linearized.extend(model, tokens[:, :13], state)
        parents = torch.tensor([[-1, 0, 0, 1, 3], [-1, -1, 1, 2, 3]])
        found["nodes"], pending = linearized.verify(model, tokens[:, 20:25], parents, state)
        (first, *_) = linear_modules(model).values()
        assert pending.fresh.backend == first.linear_attention.backend
        if step == "commit":
            linearized.commit(state, pending, [[0, 1, 3], [1]])
    else:
        text = tokens[0, :11].tolist()
        spoken = linearized.generate(model, text, max_new_tokens=9, drafter="ngram")
        return {"text": torch.tensor(spoken, dtype=torch.float64)}
    found["after"] = linearized.extend(model, tokens[:, 50:53], state)
    return found


def assert_same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert (found[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max(), name


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_backend_is_the_model(linear, backend, step):
    model = linear(dtype=torch.float64)
    want = used(model, step)
    linearized.set_backend(model, backend)
    assert_same(used(model, step), want)


@pytest.mark.parametrize("steps", [["commit"], pytest.param(STEPS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("attention", ["grouped", "hedgehog"])
def test_triton_is_the_model(linear, llama, attention, steps, tmp_path):
    """In a process of its own, where Triton's interpreter stands in for the GPU."""
    if attention == "grouped":
        model = linear(dtype=torch.float32, layers=1)
    else:
        config = linearized.LinearConfig(
            attention=attention, group=8, window=1, sinks=4, bound=16.0, taps=5
        )
        model = linearized.linearize(llama(layers=1), config)
    model.save_pretrained(tmp_path)
    torch.save({step: used(model, step) for step in steps}, tmp_path / "want.pt")
    script = f"""
import importlib.util, torch, linearized
spec = importlib.util.spec_from_file_location("test_backends", {__file__!r})
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
model = linearized.load({str(tmp_path)!r})
linearized.set_backend(model, "triton")
for step, want in torch.load({str(tmp_path / "want.pt")!r}).items():
    tests.assert_same(tests.used(model, step), want)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
