"""Decoding many sequences at a time: a linearized Llama against its softmax twin, by batch size.

    python -m jobs.bench_batches --device cuda --dtype bfloat16 --hidden 2048 --layers 18
    python -m jobs.bench_batches --quick    # seconds; for a look, not for figures

One step adds a token to every sequence of the batch. Ours verifies and commits; the twin runs
transformers' forward with a static cache. Contexts are not computed: states and caches hold random
numbers. What does not fit into memory is named and left out. Says how many bytes a sequence takes,
and for how many sequences the device has room. Ends with one line of JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import linearized
from jobs import measure
from jobs.bench_models import twins_of
from jobs.bench_ops import DTYPES
from jobs.measure import Machine, Run, Timing, in_turns, last_line, show
from linearized.cache import CACHE

OURS, STATIC = "ours", "softmax, static cache"


def main(
    contexts: Annotated[str, typer.Option(help="Tokens, with commas between.")] = "8192,32768",
    batches: Annotated[str, typer.Option(help="Sequences, with commas between.")] = "1,8,32,128",
    hidden: Annotated[int, typer.Option(help="Hidden width, a multiple of 64.")] = 512,
    layers: Annotated[int, typer.Option(help="Layers.")] = 12,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads; 0: as many as heads.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    backend: Annotated[str, typer.Option(help="Of linear attention: cpu (chunks), triton.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compile: Annotated[
        bool, typer.Option(help="Compile both; the twin with CUDA graphs on a GPU.")
    ] = False,
    turns: Annotated[int, typer.Option(help="Turns of each contestant.")] = 9,
    budget: Annotated[float, typer.Option(help="Seconds for one comparison.")] = 10.0,
    quick: Annotated[bool, typer.Option(help="A tiny model, two batches.")] = False,
) -> None:
    """Time of a step and bytes of a sequence, by the number of sequences."""
    if quick:
        contexts, batches, hidden, layers, turns, budget = "128", "1,2", 64, 2, 2, 0.5
    try:
        lengths = [int(context) for context in contexts.split(",")]
        sizes = [int(batch) for batch in batches.split(",")]
        where, kind = torch.device(device), DTYPES[dtype]
    except (ValueError, KeyError, RuntimeError) as error:
        raise typer.BadParameter(f"not understood: {error}") from error
    if hidden % 64 or min(*lengths, *sizes) < 1:
        raise typer.BadParameter(
            "hidden must be a multiple of 64, contexts and batches at least 1, got "
            f"hidden={hidden}, contexts={contexts}, batches={batches}"
        )
    if where.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this machine has no CUDA device; use --device cpu")
    console = measure.console()
    machine = Machine.measure(where, kind)
    console.print(str(machine))
    softmax, linear = twins_of(hidden, layers, where, kv_heads=kv_heads, dtype=kind)
    linearized.set_backend(linear, backend or None)
    count = sum(p.numel() for p in softmax.parameters())
    console.print(f"{count / 1e6:.1f}M parameters, {layers} layers, hidden {hidden}")
    if compile:
        linearized.compile(linear)
        mode = "reduce-overhead" if where.type == "cuda" else "default"
        softmax.compile(dynamic=False, mode=mode)
    results: dict[str, Any] = {}
    for context in lengths:
        results[str(context)] = found = [
            _compare(softmax, linear, context, batch, turns=turns, budget=budget) for batch in sizes
        ]
        _show(context, found, console)
    weights = sum(p.nbytes for p in softmax.parameters())
    room = _room(where, weights)
    results["largest_batch"] = largest = {
        str(context): {
            name: int(room / size) for name, size in _sizes(softmax, linear, context).items()
        }
        for context in lengths
    } if room else {}  # fmt: skip
    for context_, fits in largest.items():
        each = ", ".join(f"{name} {many:,}" for name, many in fits.items())
        console.print(f"sequences that fit at {int(context_):,} tokens: {each}")
    config = {
        "parameters": count, "hidden": hidden, "layers": layers, "kv_heads": kv_heads,
        "dtype": dtype, "backend": backend, "compiled": compile,
    }  # fmt: skip
    print(last_line("bench_batches", machine, config=config, results=results))


def _compare(
    softmax: PreTrainedModel,
    linear: PreTrainedModel,
    context: int,
    batch: int,
    *,
    turns: int,
    budget: float,
) -> dict[str, Any]:
    device = linear.device
    makers: dict[str, Callable[[], tuple[Run, int]]] = {
        OURS: partial(_ours, linear, context, batch),
        STATIC: partial(_static, softmax, context, batch),
    }
    times: dict[str, Timing] = {}
    sizes, left_out = {}, {}
    for name, make in makers.items():  # one after the other: both together might not fit
        try:
            run, size = make()
            times |= in_turns({name: run}, turns=turns, budget=budget / 2, device=device)
            sizes[name] = size // batch
        except (torch.OutOfMemoryError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            left_out[name] = f"{type(error).__name__}: {reason[:100]}"
        run = None  # type: ignore[assignment]
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"batch": batch, "time": times, "bytes": sizes, "left_out": left_out}


def _ours(model: PreTrainedModel, context: int, batch: int) -> tuple[Run, int]:
    state = _state(model, context, batch)
    token = torch.ones(batch, 1, dtype=torch.int64, device=model.device)
    path = [[0]] * batch

    def step() -> None:
        _, pending = linearized.verify(model, token, torch.full_like(token, -1), state)
        linearized.commit(state, pending, path)

    return step, state.nbytes


def _state(model: PreTrainedModel, context: int, batch: int) -> linearized.DecodeState:
    """States of texts of this length, in the middle of a group."""
    state = linearized.new_state(model, batch_size=batch)
    half = state.layers.group // 2
    for name, tensor in state.layers.tensors().items():
        if name == "length":
            tensor.fill_(context // state.layers.group * state.layers.group + half)
        elif name in ("keys", "values"):
            tensor[:, :, :, :half].normal_()
        else:
            tensor.normal_()
    return state


def _static(model: PreTrainedModel, context: int, batch: int) -> tuple[Run, int]:
    config = model.config
    cache = transformers.StaticCache(config=config, max_cache_len=context + 1)
    width = config.hidden_size // config.num_attention_heads
    shape = batch, config.num_key_value_heads, context, width
    for layer in range(config.num_hidden_layers):
        past: Tensor = torch.randn(shape, device=model.device, dtype=model.dtype)
        cache.update(past, past, layer)
    token = torch.ones(batch, 1, dtype=torch.int64, device=model.device)
    position = torch.full_like(token, context)

    @torch.no_grad()
    def step() -> None:
        for layer in cache.layers:  # write the same slot again
            layer.cumulative_length.fill_(context)  # type: ignore[union-attr]
        model(input_ids=token, position_ids=position, use_cache=True, **{CACHE: cache})

    layers: list[Any] = cache.layers
    return step, sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def _sizes(softmax: PreTrainedModel, linear: PreTrainedModel, context: int) -> dict[str, int]:
    """Bytes of one sequence."""
    config = softmax.config
    width = config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * width * context
    return {OURS: linearized.new_state(linear).nbytes, STATIC: numbers * softmax.dtype.itemsize}


def _room(device: torch.device, weights: int) -> float:
    """Bytes that one model leaves for sequences, with a twentieth kept free; 0: not known."""
    if device.type != "cuda":
        return 0.0
    return 0.95 * torch.cuda.get_device_properties(device).total_memory - weights


def _show(context: int, found: list[dict[str, Any]], console: Console) -> None:
    rows = []
    for case in found:
        batch, times = case["batch"], case["time"]
        for name, timing in times.items():
            faster = ""
            if name != OURS and OURS in times:
                faster = f"{timing.median / times[OURS].median:.2f} ×"
            speed = f"{batch / timing.median:,.0f}"
            size = f"{case['bytes'][name]:,}"
            rows.append([str(batch), name, str(timing), speed, faster, size])
        rows += [[str(batch), name, why, "", "", ""] for name, why in case["left_out"].items()]
    columns = ["batch", "", "time of a step (quartiles)", "tokens/s", "ours is faster",
               "bytes of a sequence"]  # fmt: skip
    show(f"Decoding after {context:,} tokens", columns, rows, console)


if __name__ == "__main__":
    typer.run(main)
