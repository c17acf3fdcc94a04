"""The benchmarks: what they measure against is right, and what they print can be read."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from jobs import baselines, bench_decode, bench_models, bench_ops
from jobs.measure import Bar, Timing, in_turns, peak_bytes, processor
from linearized import ops
from linearized.errors import DataError

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


@pytest.mark.parametrize(
    "info,name,instructions",
    [
        (
            "processor: 0\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Intel(R) Xeon(R)\n"
            "flags\t\t: fpu avx2 avx512f amx_bf16 amx_tile amx_int8 avx512_bf16\n\n"
            "processor: 1\nmodel name\t: another\nflags\t\t: fpu\n",
            "Intel(R) Xeon(R) (family 6, model 207)",
            ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8"),
        ),
        ("model name: AMD EPYC 7B13\nflags: fpu avx2", "AMD EPYC 7B13", ("avx2",)),
        ("processor: 0\nFeatures: fp asimd bf16", None, ("asimd", "bf16")),
        ("", None, ()),
    ],
)
def test_a_processor_and_its_instructions(info, name, instructions):
    found, have = processor(info)
    assert have == instructions
    assert found == name if name else isinstance(found, str)


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [x for item in value.values() for x in numbers(item)]
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.parametrize(
    "module,parts",
    [
        ("jobs.bench_ops", {"forward", "forward_backward", "steps", "windows"}),
        ("jobs.bench_models", {"constant", "decode", "hybrid", "trees", "prefill", "windows"}),
        ("jobs.bench_quick", {"steps", "prompts", "shares", "texts"}),
    ],
)
def test_the_last_line_is_all_of_it(module, parts):
    done = subprocess.run(
        [sys.executable, "-m", module, "--quick"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["command"] == module.removeprefix("jobs.")
    assert set(record["results"]) == parts
    found = numbers(record["results"])
    assert len(found) > 20
    assert all(math.isfinite(x) and x > 0 for x in found)
    machine = record["machine"]
    assert machine["device"] and " ".join(machine["instructions"]) in done.stdout.splitlines()[0]
    assert machine["threads"] >= 1 and record["date"] and record["commit"]
    assert all({"name", "value", "bound", "met"} <= set(bar) for bar in record["bars"])


def test_every_drafter_is_compared_with_plain_decoding(pair):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.bench_decode", "--quick", "--run", str(pair)],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    record = json.loads(done.stdout.splitlines()[-1])
    results = record["results"]
    assert all(math.isfinite(x) and x >= 0 for x in numbers(results))
    cases = results["cases"]
    assert {case["corpus"] for case in cases} == {"standard library"}
    assert {case["batch"] for case in cases} == {1, 2}
    assert {case["temperature"] for case in cases} == {0.0, 0.8}
    assert {case["drafter"] for case in cases} == {
        "plain", "model", "ngram", "model, then ngram", "useless model", "pruned", "softmax model",
        "medusa", "layers",
    }  # fmt: skip
    assert not any(case["other_texts"] for case in cases)
    assert set(results["agreement"]) == {
        "the text itself", "model", "pruned", "softmax model", "medusa", "layers",
    }  # fmt: skip
    for twin in results["twins"].values():
        assert set(twin) == {"transformers", "transformers, assisted", "ours", "ours, drafted"}
    assert all(0 <= case["repeated"] <= 1 and case["tokens_per_round"] >= 1 for case in cases)
    assert set(results["twins"]) == {"0.0", "0.8"}


def test_prompts_come_from_all_that_is_given(pair, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    chat = tmp_path / "chat.jsonl"
    lines = [json.dumps({"turns": [f"{i} lazy dogs", "?"]}) + "\n" for i in range(4)]
    chat.write_text("".join(lines))
    found = bench_decode._prompts(pair, [text, chat], 4, 20)
    assert list(found) == ["standard library", "text", "chat"]
    assert all(len(prompts) == 4 for prompts in found.values())
    assert {len(prompt) for name in ("standard library", "text") for prompt in found[name]} == {20}
    assert all(0 < len(prompt) <= 20 for prompt in found["chat"])
    with pytest.raises(DataError, match="4 prompts, 5 are asked for"):
        bench_decode._prompts(pair, [chat], 5, 20)
    chat.write_text("{}\n")
    with pytest.raises(DataError, match="needs `turns`"):
        bench_decode._prompts(pair, [chat], 1, 20)


def invoke(bench, *options: str):
    app = typer.Typer()
    app.command()(bench.main)
    return CliRunner().invoke(app, list(options))


def test_drafters_and_texts_that_are_asked_for(pair, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    options = ["--run", str(pair), "--quick", "--texts", str(text)]
    done = invoke(bench_decode, *options, "--drafter", "ngram", "--drafter", "layers")
    assert done.exit_code == 0, done.output
    cases = json.loads(done.stdout.splitlines()[-1])["results"]["cases"]
    assert {case["drafter"] for case in cases} == {"plain", "ngram", "layers"}
    assert {case["corpus"] for case in cases} == {"standard library", "text"}
    done = invoke(bench_decode, *options, "--drafter", "parrot")
    assert done.exit_code == 2 and "parrot" in done.output


@pytest.mark.parametrize(
    "bench,option,value",
    [
        (bench_ops, "--lengths", "many"),
        (bench_ops, "--dtype", "int3"),
        (bench_models, "--hidden", "100"),
        (bench_decode, "--batches", "1,0"),
        (bench_decode, "--groups", "0"),
        (bench_decode, "--run", "nowhere"),
    ],
)
def test_bad_options_are_refused(bench, option, value):
    done = invoke(bench, option, value)
    assert done.exit_code == 2
    assert value in done.output
