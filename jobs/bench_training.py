"""Training speed: forward and backward of a linearized Llama against its softmax twin.

    python -m jobs.bench_training --device cuda --dtype bfloat16 --hidden 2048 --layers 18
    python -m jobs.bench_training --quick    # seconds; for a look, not for figures

One sequence a step, the loss of the next token, gradients of all parameters, no optimizer. Texts of
`checkpoint_from` tokens and more recompute each layer in the backward pass, for both models. What
does not fit into memory is named and left out. Ends with one line of JSON.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import PreTrainedModel

import linearized
from jobs import measure
from jobs.bench_models import twins_of
from jobs.bench_ops import DTYPES
from jobs.measure import Machine, Run, Timing, in_turns, last_line, peak_bytes, show
from linearized.training.objective import cross_entropy

SOFTMAX = "softmax (SDPA)"


def main(
    lengths: Annotated[str, typer.Option(help="Tokens, with commas between.")] = "4096,32768",
    hidden: Annotated[int, typer.Option(help="Hidden width, a multiple of 64.")] = 512,
    layers: Annotated[int, typer.Option(help="Layers.")] = 12,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads; 0: as many as heads.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    checkpoint_from: Annotated[int, typer.Option(help="Tokens from which on to recompute.")] = 8192,
    turns: Annotated[int, typer.Option(help="Turns of each contestant.")] = 5,
    budget: Annotated[float, typer.Option(help="Seconds for each contestant.")] = 15.0,
    quick: Annotated[bool, typer.Option(help="A tiny model, short texts.")] = False,
) -> None:
    """Tokens per second of forward and backward."""
    if quick:
        lengths, hidden, layers, turns, budget = "128,256", 64, 2, 2, 0.5
        checkpoint_from = 256
    try:
        sizes = [int(length) for length in lengths.split(",")]
        where, kind = torch.device(device), DTYPES[dtype]
    except (ValueError, KeyError, RuntimeError) as error:
        raise typer.BadParameter(f"not understood: {error}") from error
    if hidden % 64 or min(sizes) < 2:
        raise typer.BadParameter(
            f"hidden must be a multiple of 64 and lengths at least 2, got hidden={hidden}, "
            f"lengths={lengths}"
        )
    if where.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this machine has no CUDA device; use --device cpu")
    console = measure.console()
    machine = Machine.measure(where, kind)
    console.print(str(machine))
    softmax, linear = twins_of(hidden, layers, where, kv_heads=kv_heads, dtype=kind)
    count = sum(p.numel() for p in softmax.parameters())
    console.print(f"{count / 1e6:.1f}M parameters, {layers} layers, hidden {hidden}")
    backends = {"ours (triton)": "triton"} if where.type == "cuda" else {}
    backends["ours (chunks)"] = "cpu"
    results: dict[str, Any] = {}
    for tokens in sizes:
        results[str(tokens)] = found = _compare(
            softmax, linear, backends, tokens, recompute=tokens >= checkpoint_from,
            turns=turns, budget=budget,
        )  # fmt: skip
        _show(tokens, found, console)
    config = {
        "parameters": count, "hidden": hidden, "layers": layers, "kv_heads": kv_heads,
        "dtype": dtype, "checkpoint_from": checkpoint_from,
    }  # fmt: skip
    print(last_line("bench_training", machine, config=config, results=results))


def _compare(
    softmax: PreTrainedModel,
    linear: PreTrainedModel,
    backends: dict[str, str],
    tokens: int,
    *,
    recompute: bool,
    turns: int,
    budget: float,
) -> dict[str, Any]:
    device = linear.device
    contestants = {**{name: (linear, backend) for name, backend in backends.items()},
                   SOFTMAX: (softmax, None)}  # fmt: skip
    times: dict[str, Timing] = {}
    peaks, left_out = {}, {}
    for name, (model, backend) in contestants.items():
        if backend is not None:
            linearized.set_backend(model, backend)
        try:
            run = _step(model, tokens, recompute)
            times |= in_turns({name: run}, turns=turns, budget=budget, device=device)
            if device.type == "cuda":
                peaks[name] = peak_bytes(run, device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            left_out[name] = f"{type(error).__name__}: {reason[:100]}"
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    speeds = {name: tokens / timing.median for name, timing in times.items()}
    return {
        "time": times, "tokens_per_second": speeds, "peak_bytes": peaks, "left_out": left_out,
        "recomputed": recompute,
    }  # fmt: skip


def _step(model: PreTrainedModel, tokens: int, recompute: bool) -> Run:
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.24 has other names for it
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        cross_entropy(model(input_ids=ids, use_cache=False).logits, ids).backward()

    return step


def _show(tokens: int, found: dict[str, Any], console: Console) -> None:
    times: dict[str, Timing] = found["time"]
    rows = []
    for name, timing in times.items():
        slower = ""
        if SOFTMAX in times and name != SOFTMAX:
            slower = f"{times[SOFTMAX].median / timing.median:.2f} ×"
        peak = f"{found['peak_bytes'][name] / 1e9:.1f} GB" if name in found["peak_bytes"] else ""
        speed = f"{found['tokens_per_second'][name]:,.0f}"
        rows.append([name, str(timing), speed, slower, peak])
    rows += [[name, why, "", "", ""] for name, why in found["left_out"].items()]
    columns = ["", "time (quartiles)", "tokens/s", "faster than softmax", "peak memory"]
    how = ", layers recomputed" if found["recomputed"] else ""
    show(f"Forward and backward of {tokens:,} tokens{how}", columns, rows, console)


if __name__ == "__main__":
    typer.run(main)
