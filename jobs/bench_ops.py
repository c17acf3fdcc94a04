"""Grouped linear attention against softmax attention and the straightforward einsum formulation.

    python -m jobs.bench_ops            # about five minutes on two CPU cores
    python -m jobs.bench_ops --quick    # seconds; for a look, not for figures

Forward, forward and backward, a decode step and trees, from 1K to 64K tokens of context; then the
same with a window and sinks beside none, which is no rival but a choice. Ends with one line of
JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from jobs import baselines, measure, windows
from jobs.measure import Bar, Machine, Run, Timing, in_turns, last_line, peak_bytes, show, show_bars
from linearized import ops
from linearized.errors import ConfigError
from linearized.tree import ancestors

SDPA, EINSUM = "softmax (SDPA)", "einsum"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one run of this benchmark measures."""

    heads: int
    width: int
    group: int
    taps: int
    dtype: torch.dtype
    device: torch.device
    turns: int
    budget: float
    """Seconds for one comparison. Softmax attention is left out where three turns would take
    longer."""

    def draw(self, tokens: int) -> Tensor:
        shape = (1, self.heads, tokens, self.width)
        return torch.randn(shape, device=self.device).to(self.dtype)

    def parameters(self) -> tuple[Tensor, Tensor]:
        alpha = torch.randn(self.heads, device=self.device) / 10
        taps = torch.randn(self.heads, self.taps, device=self.device) / 10
        return alpha.to(self.dtype), taps.to(self.dtype)

    def ours(self) -> dict[str, str]:
        """Our backends on this device, by their names in the tables."""
        if self.device.type == "cuda":
            return {"ours (triton)": "triton", "ours (chunks)": "cpu"}
        return {"ours": "cpu"}


def main(
    lengths: Annotated[
        str, typer.Option(help="Tokens, with commas between.")
    ] = "1024,4096,16384,65536",
    heads: Annotated[int, typer.Option(help="Heads.")] = 8,
    width: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    group: Annotated[int, typer.Option(help="Tokens in a group.")] = 64,
    taps: Annotated[int, typer.Option(help="Taps of the convolution.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    turns: Annotated[int, typer.Option(help="Turns of each contestant.")] = 9,
    budget: Annotated[float, typer.Option(help="Seconds for one comparison.")] = 25.0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's own choice.")] = 0,
    quick: Annotated[bool, typer.Option(help="256 and 512 tokens, two turns.")] = False,
) -> None:
    """Time, memory and state of grouped linear attention, side by side with its rivals."""
    if threads:
        torch.set_num_threads(threads)
    if quick:
        lengths, turns, budget = "256,512", 2, 0.5
    try:
        sizes = [int(length) for length in lengths.split(",")]
        kind = DTYPES[dtype]
        where = torch.device(device)
    except (ValueError, KeyError, RuntimeError) as error:
        raise typer.BadParameter(f"not understood: {error}") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this machine has no CUDA device; use --device cpu")
    torch.manual_seed(0)
    setting = Setting(
        heads=heads, width=width, group=group, taps=taps, dtype=kind, device=where,
        turns=turns, budget=budget,
    )  # fmt: skip
    console = measure.console()
    machine = Machine.measure(where, kind)
    console.print(str(machine))
    try:
        results = _bench(setting, sizes, machine, console)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    bars = _bars(results, sizes) + windows.bars(results["windows"], 16384)
    show_bars(bars, console)
    config = {"heads": heads, "width": width, "group": group, "taps": taps, "dtype": dtype}
    print(last_line("bench_ops", machine, config=config, results=results, bars=bars))


def _bench(
    setting: Setting, sizes: list[int], machine: Machine, console: Console
) -> dict[str, Any]:
    forward = {n: _sequence(setting, n, backward=False) for n in sizes}
    _show_sequence("Forward", forward, setting, machine, console)
    both = {n: _sequence(setting, n, backward=True) for n in sizes}
    _show_sequence("Forward and backward", both, setting, machine, console)
    steps = {n: _steps(setting, n) for n in sizes}
    _show_steps(steps, machine, console)
    near = {n: _windows(setting, n) for n in sizes}
    windows.show_windows("A window and sinks beside none", near, console)
    return {"forward": forward, "forward_backward": both, "steps": steps, "windows": near}


def _windows(setting: Setting, tokens: int) -> dict[str, Any]:
    return windows.operators(
        tokens, turns=setting.turns, budget=setting.budget / 4, device=setting.device,
        heads=setting.heads, width=setting.width, group=setting.group, taps=setting.taps,
        dtype=setting.dtype,
    )  # fmt: skip


def _sequence(setting: Setting, tokens: int, *, backward: bool) -> dict[str, Any]:
    q, k, v = (setting.draw(tokens) for _ in range(3))
    alpha, taps = setting.parameters()
    inputs = [q, k, v, alpha, taps]
    grad = setting.draw(tokens)
    shared: dict[str, Any] = {"alpha": alpha, "taps": taps, "group": setting.group}
    calls: dict[str, Run] = {
        name: partial(ops.mix, q, k, v, **shared, backend=backend)
        for name, backend in setting.ours().items()
    }
    calls[EINSUM] = partial(baselines.einsum, q, k, v, **shared)
    calls[SDPA] = partial(baselines.softmax, q, k, v)
    runs = {name: _with_gradient(call, inputs, grad) if backward else _without(call)
            for name, call in calls.items()}  # fmt: skip
    if setting.device.type == "cuda":
        runs |= _fla(q, k, v, grad, backward=backward)
    left_out = {}
    estimate = _estimate(setting, tokens, backward)
    if 3 * estimate > setting.budget:  # warming up, and two turns
        left_out[SDPA] = f"left out: about {estimate:.0f} s a turn"
        del runs[SDPA]
    for x in inputs:
        x.requires_grad_(backward)
    if setting.device.type == "cuda":
        left_out |= _failures(runs)
        runs = {name: run for name, run in runs.items() if name not in left_out}
    timings = in_turns(runs, turns=setting.turns, budget=setting.budget, device=setting.device)
    peaks = {name: peak_bytes(run, setting.device) for name, run in runs.items()}
    return {
        "time": timings,
        "peak_bytes": peaks,
        "input_bytes": q.nbytes + k.nbytes + v.nbytes,
        "left_out": left_out,
    }


def _fla(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *, backward: bool) -> dict[str, Run]:
    """Runs of flash-linear-attention's operators, on copies that lie as they want them."""
    calls = baselines.fla()
    if not calls:
        return {}
    *own, grad = (x.transpose(1, 2).contiguous() for x in (q, k, v, grad))
    for x in own:
        x.requires_grad_(backward)
    bound = {name: partial(call, *own) for name, call in calls.items()}
    return {
        name: _with_gradient(call, own, grad) if backward else _without(call)
        for name, call in bound.items()
    }


def _failures(runs: dict[str, Run]) -> dict[str, str]:
    """Who cannot run here, and why: one contestant that fails must not end the others."""
    found = {}
    for name, run in runs.items():
        try:
            run()
            torch.cuda.synchronize()
        except Exception as error:  # whatever a rival's kernels raise
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            found[name] = f"left out: {type(error).__name__}: {reason[:100]}"
    return found


def _without(call: Run) -> Run:
    return torch.no_grad()(call)


def _with_gradient(call: Run, inputs: list[Tensor], grad: Tensor) -> Run:
    def run() -> None:
        out = call()
        assert isinstance(out, Tensor)
        torch.autograd.grad(out, inputs, grad, allow_unused=True)

    return run


def _estimate(setting: Setting, tokens: int, backward: bool) -> float:
    """Seconds of softmax attention, from a short one: quadratic in the tokens."""
    if tokens <= 2048:
        return 0.0
    q, k, v = (setting.draw(2048).requires_grad_(backward) for _ in range(3))
    call = partial(baselines.softmax, q, k, v)
    run = _with_gradient(call, [q, k, v], setting.draw(2048)) if backward else _without(call)
    timing = in_turns({SDPA: run}, turns=3, budget=1, device=setting.device)[SDPA]
    return timing.median * (tokens / 2048) ** 2


@torch.no_grad()
def _steps(setting: Setting, context: int) -> dict[str, Any]:
    """One token after `context` of them, and trees of 16 and 64 nodes.

    Ours with an open group that is empty, half full, or so full that the trees cross its end."""
    fills = {"": 0, " (half)": setting.group // 2, " (crossing)": setting.group - 3}
    longest = context + max(fills.values())
    q, k, v = (setting.draw(longest) for _ in range(3))
    alpha, taps = setting.parameters()
    shared: dict[str, Any] = {"alpha": alpha, "taps": taps, "group": setting.group}
    states = {
        fill: ops.attend(*(x[:, :, : context + more] for x in (q, k, v)), **shared)[1]
        for fill, more in fills.items()
    }
    state = states[""]
    cache = baselines.Cache(k[:, :, :context], v[:, :, :context], 64)
    runs: dict[str, Run] = {}
    for nodes in (1, 16, 64):
        parents = torch.tensor([[-1, *((n - 1) // 2 for n in range(1, nodes))]])
        tree = parents.to(setting.device)
        x, y, z = (setting.draw(nodes) for _ in range(3))
        visible = ancestors(tree)[0]
        seen = torch.cat([visible.new_ones(nodes, context), visible], dim=1) if nodes > 1 else None
        for fill, past in states.items():
            for name, backend in setting.ours().items():
                runs[f"{name}{fill}, {nodes}"] = partial(
                    ops.attend_tree, x, y, z, tree, past, **shared, backend=backend
                )
        runs[f"{SDPA}, {nodes}"] = partial(cache.attend, x, y, z, seen)
    one, two = setting.draw(1), setting.draw(1)
    again = state.clone()
    for name, backend in setting.ours().items():
        runs[f"{name}, commit of 1"] = partial(ops.fold_, again, one, two, backend=backend)
    timings = in_turns(
        runs, turns=3 * setting.turns, budget=setting.budget / 4, device=setting.device
    )
    state_bytes = sum(x.nbytes for x in state.tensors().values())
    return {"time": timings, "state_bytes": state_bytes, "cache_bytes": cache.nbytes}


def _show_sequence(
    title: str, found: dict[int, Any], setting: Setting, machine: Machine, console: Console
) -> None:
    columns = ["tokens", "", "time (quartiles)", "ours is faster", "peak MB", "× inputs", "FLOP/s"]
    rows = []
    for tokens, result in found.items():
        times: dict[str, Timing] = result["time"]
        mine = [times[name].median for name in setting.ours() if name in times]
        ours = min(mine, default=float("nan"))
        work = _operations(setting, tokens) * (3.5 if title != "Forward" else 1)
        for name, timing in times.items():
            peak = result["peak_bytes"][name]
            is_ours = name in setting.ours()
            rows.append([
                f"{tokens:,}",
                name,
                str(timing),
                "" if is_ours else f"{timing.median / ours:.1f} ×",
                f"{peak / 1e6:,.1f}",
                f"{peak / result['input_bytes']:.2f}",
                f"{work / timing.median / machine.flops:.0%} of the machine's" if is_ours else "",
            ])  # fmt: skip
        for name, why in result["left_out"].items():
            rows.append([f"{tokens:,}", name, why, "", "", "", ""])
    show(title, columns, rows, console)


def _operations(setting: Setting, tokens: int) -> float:
    """Floating-point operations of our forward: scores and their values in the group, memory
    written and read, and the taps that reach out of it. With the backward: 3.5 times as many, two
    for each product's gradients and a half for those computed again."""
    pair = 2 * setting.group * 2 * setting.width
    memory = 2 * 2 * setting.width**2
    reach = 2 * (setting.taps - 1) * setting.width
    return float(tokens * setting.heads * (pair + memory + reach))


def _show_steps(found: dict[int, Any], machine: Machine, console: Console) -> None:
    columns = ["context", "", "time (quartiles)", "× of one token", "bytes", "bytes/s"]
    rows = []
    for context, result in found.items():
        times: dict[str, Timing] = result["time"]
        for name, timing in times.items():
            kind, what = name.split(", ")
            single = times[f"{kind}, 1"].median
            size = result["cache_bytes" if kind == SDPA else "state_bytes"]
            share = size / timing.median / machine.copy
            rows.append([
                f"{context:,}",
                f"{kind}, {what}" + {"1": " node", "16": " nodes", "64": " nodes"}.get(what, ""),
                str(timing),
                "" if what.startswith("commit") else f"{timing.median / single:.2f}",
                f"{size:,}",
                f"{share:.0%} of a copy's" if what == "1" else "",
            ])  # fmt: skip
    show("A step: one token, and trees, on top of a context", columns, rows, console)


def _bars(results: dict[str, Any], sizes: list[int]) -> list[Bar]:
    def ratio(part: str, other: str) -> float | None:
        times = results[part].get(16384, {}).get("time", {})
        if other not in times or "ours" not in times:
            return None
        return float(times[other].median / times["ours"].median)

    extra = tree = growth = None
    long = results["forward"].get(16384)
    if long is not None and "ours" in long["peak_bytes"]:
        extra = long["peak_bytes"]["ours"] / long["input_bytes"]
    steps = results["steps"]
    if 16384 in steps and "ours, 1" in steps[16384]["time"]:
        times = steps[16384]["time"]
        fills = ("ours", "ours (half)", "ours (crossing)")
        tree = max(times[f"{fill}, 16"].median / times[f"{fill}, 1"].median for fill in fills)
    if len(sizes) > 1:
        growth = steps[sizes[-1]]["state_bytes"] / steps[sizes[0]]["state_bytes"]
    return [
        Bar("forward at 16K, times as fast as SDPA softmax", ratio("forward", SDPA), 15),
        Bar("forward at 16K, times as fast as einsum", ratio("forward", EINSUM), 2),
        Bar("forward at 16K, peak extra memory over the inputs", extra, 2, least=False),
        Bar("forward + backward at 16K, × SDPA softmax", ratio("forward_backward", SDPA), 10),
        Bar("16-node tree over one token, at 16K, worst open group", tree, 1.5, least=False),
        Bar("bytes of state, longest over shortest context", growth, 1, least=False),
    ]


if __name__ == "__main__":
    typer.run(main)
