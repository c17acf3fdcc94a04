"""The benchmarks: what they measure against is right, and what they print can be read."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from jobs import baselines
from jobs.measure import Bar, Timing, in_turns, peak_bytes
from linearized import ops

CPU = torch.device("cpu")


def test_the_einsum_formulation_is_the_same_mathematics():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 150, 8, dtype=torch.float64) for _ in range(3))
    alpha, taps = torch.randn(3, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, alpha, taps)]
    shared = {"alpha": alpha, "taps": taps, "group": 16}
    ours, theirs = ops.mix(q, k, v, **shared), baselines.einsum(q, k, v, **shared)
    assert torch.allclose(ours, theirs)
    grad = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(one, other)


def test_the_cache_is_causal_attention():
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    cache = baselines.Cache(k[:, :, :15], v[:, :, :15], 8)
    seen = torch.cat([torch.ones(5, 15), torch.ones(5, 5).tril()], dim=1).bool()
    out = cache.attend(q[:, :, 15:], k[:, :, 15:], v[:, :, 15:], seen)
    assert torch.allclose(out, baselines.softmax(q, k, v)[:, :, 15:], atol=1e-6)
    one = cache.attend(q[:, :, 15:16], k[:, :, 15:16], v[:, :, 15:16])
    assert torch.allclose(one, out[:, :, :1], atol=1e-6)


def test_peak_bytes_sees_what_is_let_go_again(capfd):
    def run() -> torch.Tensor:
        big = torch.ones(1 << 20)
        small = big[: 1 << 10].clone()
        del big
        return torch.cat([small, torch.ones(1 << 18)])

    assert 4 << 20 <= peak_bytes(run, CPU) < (4 << 20) + (1 << 20)
    assert capfd.readouterr().err == ""


def test_turns_alternate_and_give_quartiles():
    calls: list[str] = []
    found = in_turns(
        {name: lambda name=name: calls.append(name) for name in "ab"}, turns=4, budget=9,
        device=CPU, warm=False,
    )  # fmt: skip
    assert "".join(calls) == "abbaabba"
    assert found["a"].turns == 4
    timing = Timing.of([5.0, 1.0, 2.0, 3.0, 100.0])
    assert (timing.median, timing.low, timing.high) == (3.0, 2.0, 5.0)


def test_bars():
    assert Bar("speed", 3.0, 2).met and not Bar("speed", 1.9, 2).met
    assert Bar("bytes", 1.0, 1, least=False).met and not Bar("bytes", 1.1, 1, least=False).met
    assert Bar("speed", None, 2).met is None


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [x for item in value.values() for x in numbers(item)]
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.parametrize(
    "module,parts",
    [
        ("jobs.bench_ops", {"forward", "forward_backward", "steps"}),
        ("jobs.bench_models", {"constant", "decode", "trees", "prefill"}),
    ],
)
def test_the_last_line_is_all_of_it(module, parts):
    done = subprocess.run(
        [sys.executable, "-m", module, "--quick"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["command"] == module.removeprefix("jobs.")
    assert set(record["results"]) == parts
    found = numbers(record["results"])
    assert len(found) > 20
    assert all(math.isfinite(x) and x > 0 for x in found)
    assert record["machine"]["threads"] >= 1 and record["date"] and record["commit"]
    assert all({"name", "value", "bound", "met"} <= set(bar) for bar in record["bars"])


def test_bad_options_are_refused():
    for module, option in (
        ("jobs.bench_ops", ("--lengths", "many")),
        ("jobs.bench_ops", ("--dtype", "int3")),
        ("jobs.bench_models", ("--hidden", "100")),
    ):
        done = subprocess.run(
            [sys.executable, "-m", module, *option], capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert option[1] in done.stderr
