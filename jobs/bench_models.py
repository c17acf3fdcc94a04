"""A linearized Llama against its softmax twin: prefill, decoding, trees, memory.

    python -m jobs.bench_models            # about twelve minutes on two CPU cores
    python -m jobs.bench_models --quick    # seconds; for a look, not for figures

Both have the same random weights; the linearized one's new parameters are random, too. Ours reads a
text in chunks with `linearized.extend`, as serving does, and decodes with `verify` and `commit` of
one token. The twin runs transformers' own forward with SDPA: prefill in one forward with a dynamic
cache, decoding with a dynamic and with a static cache. "packed" has its weights laid out for the
CPU (`linearized.pack`), the twin's just as ours. Contexts for decoding are not computed: the caches
are filled with random numbers, and so is our state, whose size does not depend on the length that
it is given. Prefill is computed in full. Models with a window and sinks are timed beside those
without, in turns. Ends with one line of JSON. `jobs.bench_quick` prints the few ratios that tell
machines apart, in a third of the time.
"""

from __future__ import annotations

import copy
import functools
import shutil
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import linearized
from jobs import hybrids, measure, windows
from jobs.bench_ops import DTYPES
from jobs.measure import Bar, Machine, Run, Timing, in_turns, last_line, show, show_bars
from linearized.cache import CACHE
from linearized.models import new_parameters

OURS, DYNAMIC, STATIC = "ours", "softmax, dynamic cache", "softmax, static cache"
SOFTMAX = "softmax"
PACKED, COMPILED = ", packed", ", packed and compiled"
LONG = 8192
"""Longer prompts take minutes: two turns, and only one softmax model."""
NODES = (1, 8, 16)


Twins = dict[str, tuple[PreTrainedModel, PreTrainedModel]]
"""The softmax model and its linear twin, by the suffix of their names."""


def main(
    contexts: Annotated[str, typer.Option(help="Tokens, with commas between.")] = "1024,8192,32768",
    prompts: Annotated[str, typer.Option(help="Prefill, tokens.")] = "2048,8192,32768",
    hidden: Annotated[int, typer.Option(help="Hidden width, a multiple of 64.")] = 512,
    layers: Annotated[int, typer.Option(help="Layers.")] = 12,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads; 0: as many as heads.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    chunk: Annotated[int, typer.Option(help="Tokens that ours reads at once.")] = 512,
    backend: Annotated[
        str,
        typer.Option(help="Of linear attention: cpu (chunks), triton; default: its own choice."),
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    turns: Annotated[int, typer.Option(help="Turns of each contestant.")] = 15,
    budget: Annotated[float, typer.Option(help="Seconds for one comparison.")] = 60.0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's own choice.")] = 0,
    quick: Annotated[bool, typer.Option(help="A tiny model, short texts.")] = False,
) -> None:
    """Speed and memory of a whole linearized model, side by side with the softmax model."""
    if threads:
        torch.set_num_threads(threads)
    if quick:
        contexts, prompts, hidden, layers, turns, budget = "128,256", "128,256", 64, 2, 2, 1.0
    try:
        sizes = [int(context) for context in contexts.split(",")]
        lengths = [int(prompt) for prompt in prompts.split(",")]
        where, kind = torch.device(device), DTYPES[dtype]
    except (ValueError, KeyError, RuntimeError) as error:
        raise typer.BadParameter(f"not understood: {error}") from error
    if hidden % 64:
        raise typer.BadParameter(f"hidden must be a multiple of 64, got {hidden}")
    if kv_heads < 0 or (kv_heads and hidden // 64 % kv_heads):
        raise typer.BadParameter(f"kv-heads must divide the {hidden // 64} heads, got {kv_heads}")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this machine has no CUDA device; use --device cpu")
    console = measure.console()
    machine = Machine.measure(where, kind)
    console.print(str(machine))
    softmax, linear = twins_of(hidden, layers, where, kv_heads=kv_heads, dtype=kind)
    linearized.set_backend(linear, backend or None)
    count = sum(p.numel() for p in softmax.parameters())
    console.print(f"{count / 1e6:.1f}M parameters, {layers} layers, hidden {hidden}")
    settings: dict[str, Any] = {"turns": turns, "budget": budget, "device": where}
    twins = {"": (softmax, linear)}
    if where.type == "cpu":
        twins[PACKED] = (_packed(softmax), _packed(linear))
        console.print(f"packing takes {linearized.pack(twins[PACKED][1]) / 1e6:.0f} MB a model")
        if shutil.which("g++") and not quick:  # compiling takes longer than all the rest of it
            twins[COMPILED] = (_packed(softmax), _packed(linear))
            twins[COMPILED][0].compile(dynamic=False)
            linearized.compile(twins[COMPILED][1])
    constant = _constant(linear, sizes, **settings)
    _show_constant(constant, console)
    decode = {n: _decode(twins, n, **settings) for n in sizes}
    _show_decode(decode, console)
    mixed = {n: _hybrid(softmax, n, **settings) for n in {sizes[0], sizes[-1]}}
    _show_hybrid(mixed, decode, console)
    trees = _trees(twins, sizes[0], **settings)
    _show_trees(trees, console)
    prefill = {n: _prefill(twins, n, chunk, **settings) for n in lengths}
    _show_prefill(prefill, console)
    near = {sizes[0]: windows.models(softmax, sizes[0], **settings)}
    windows.show_windows("A window and sinks beside none", near, console)
    bars = _bars(constant, decode, prefill) + windows.bars(near, 1024)
    show_bars(bars, console)
    config = {"parameters": count, "hidden": hidden, "layers": layers, "chunk": chunk,
              "kv_heads": kv_heads, "dtype": dtype, "backend": backend}  # fmt: skip
    results = {"constant": constant, "decode": decode, "hybrid": mixed, "trees": trees,
               "prefill": prefill, "windows": near}  # fmt: skip
    print(last_line("bench_models", machine, config=config, results=results, bars=bars))


def twins_of(
    hidden: int,
    layers: int,
    device: torch.device,
    *,
    kv_heads: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A softmax Llama with random weights, and the same linearized: 47M parameters at hidden 512
    and 12 layers, 1.1B at 2048 and 18."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 13 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=kv_heads or hidden // 64,
        max_position_embeddings=1 << 17,
        tie_word_embeddings=True,
    )
    softmax = transformers.LlamaForCausalLM(config).eval().to(device, dtype)
    linear = copy.deepcopy(softmax)
    linearized.linearize(linear, linearized.LinearConfig(attention="grouped"))
    for parameter in new_parameters(linear):
        torch.nn.init.normal_(parameter, std=0.05)
    return softmax, linear


def _packed(model: PreTrainedModel) -> PreTrainedModel:
    twin = copy.deepcopy(model)
    linearized.pack(twin)
    return twin


def _constant(
    linear: PreTrainedModel, sizes: list[int], *, turns: int, budget: float, device: torch.device
) -> dict[str, Any]:
    """Our decoding at every context, in turns with itself, where no cache of a rival gets in
    between."""
    token = torch.ones(1, 1, dtype=torch.int64, device=device)
    states = {str(n): state_of(linear, n) for n in sizes}
    runs: dict[str, Run] = {
        n: functools.partial(_ours, linear, token, state) for n, state in states.items()
    }
    times = in_turns(runs, turns=3 * turns, budget=budget, device=device)
    return {"time": times, "bytes": {n: state.nbytes for n, state in states.items()}}


@torch.no_grad()
def _decode(
    twins: Twins, context: int, *, turns: int, budget: float, device: torch.device
) -> dict[str, Any]:
    """A token after `context` of them."""
    runs: dict[str, Run] = {}
    sizes: dict[str, int] = {}
    token = torch.ones(1, 1, dtype=torch.int64, device=device)
    softmax, linear = twins[""]
    state, dynamic, static = (
        state_of(linear, context),
        _dynamic(softmax, context),
        _static(softmax, context),
    )
    for kind, (softmax, linear) in twins.items():
        own = linearized.DecodeState(state.layers, linearized.fingerprint(linear))
        runs[OURS + kind] = functools.partial(_ours, linear, token, own)
        sizes[OURS + kind] = state.nbytes
        if kind != COMPILED:  # it grows at every step, and so would be compiled at every step
            run = functools.partial(_with_dynamic, softmax, token, dynamic, context)
            runs[DYNAMIC + kind] = run
            sizes[DYNAMIC + kind] = _bytes(dynamic)
        runs[STATIC + kind] = functools.partial(_with_static, softmax, token, static, context)
        sizes[STATIC + kind] = _bytes(static)
    return {"time": in_turns(runs, turns=turns, budget=budget, device=device), "bytes": sizes}


def _ours(model: PreTrainedModel, token: Tensor, state: linearized.DecodeState) -> None:
    _, pending = linearized.verify(model, token, torch.full_like(token, -1), state)
    linearized.commit(state, pending, [[0]])


@torch.no_grad()
def _with_dynamic(
    model: PreTrainedModel, token: Tensor, cache: transformers.DynamicCache, context: int
) -> None:
    position = torch.full_like(token, context)
    model(input_ids=token, position_ids=position, use_cache=True, **{CACHE: cache})
    cache.crop(-1)


@torch.no_grad()
def _with_static(
    model: PreTrainedModel, token: Tensor, cache: transformers.StaticCache, context: int
) -> None:
    for layer in cache.layers:  # write the same slot again
        layer.cumulative_length.fill_(context)  # type: ignore[union-attr]
    position = torch.full_like(token, context)
    model(input_ids=token, position_ids=position, use_cache=True, **{CACHE: cache})


def state_of(linear: PreTrainedModel, context: int) -> linearized.DecodeState:
    """Of a text of this length, in the middle of a group."""
    group = linearized.models.linear_config(linear).group
    return hybrids.state_of(linear, context // group * group + group // 2)


def _dynamic(model: PreTrainedModel, context: int) -> transformers.DynamicCache:
    cache = transformers.DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        cache.update(*_past(model, context), layer)
    return cache


def _static(model: PreTrainedModel, context: int) -> transformers.StaticCache:
    cache = transformers.StaticCache(config=model.config, max_cache_len=context + 1)
    for layer in range(model.config.num_hidden_layers):
        cache.update(*_past(model, context), layer)
    return cache


def _past(model: PreTrainedModel, context: int) -> tuple[Tensor, Tensor]:
    config = model.config
    shape = (
        1,
        config.num_key_value_heads,
        context,
        config.hidden_size // config.num_attention_heads,
    )
    keys = torch.randn(shape, device=model.device, dtype=model.dtype)
    return keys, torch.randn_like(keys)


def _bytes(cache: transformers.Cache) -> int:
    layers: list[Any] = cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def _hybrid(softmax: PreTrainedModel, context: int, **settings: Any) -> dict[str, Any]:
    """One layer in four keeps softmax: a step, a tree, texts plain and drafted."""
    model = hybrids.hybrid_of(softmax)
    return {
        "steps": hybrids.steps(model, context, NODES, **settings),
        "texts": hybrids.texts(model, context, **settings),
        "bytes": hybrids.state_of(model, context).nbytes,
    }


@torch.no_grad()
def _trees(
    twins: Twins, context: int, *, turns: int, budget: float, device: torch.device
) -> dict[str, Timing]:
    """Trees of some nodes, verified by the whole model."""
    runs: dict[str, Run] = {}
    for kind, (_, linear) in twins.items():
        state = state_of(linear, context)
        for nodes in NODES:
            parents = torch.tensor([[-1, *((n - 1) // 2 for n in range(1, nodes))]], device=device)
            tokens = torch.ones_like(parents)
            runs[f"{nodes}{kind}"] = functools.partial(
                linearized.verify, linear, tokens, parents, state
            )
    return in_turns(runs, turns=turns, budget=budget, device=device)


@torch.no_grad()
def _prefill(
    twins: Twins, tokens: int, chunk: int, *, turns: int, budget: float, device: torch.device
) -> dict[str, Any]:
    """A prompt, to the logits of its last token."""
    prompt = torch.randint(8192, (1, tokens), device=device)
    runs: dict[str, Run] = {}
    for kind, (softmax, linear) in twins.items():
        if kind == COMPILED:  # that is for steps
            continue
        runs[OURS + kind] = functools.partial(read_prompt, linear, prompt, chunk)
        if tokens <= LONG or not kind:
            runs[SOFTMAX + kind] = functools.partial(_forward, softmax, prompt)
    warm = tokens <= LONG  # the shorter ones have warmed up the longer
    turns = turns if warm else 2
    return {"time": in_turns(runs, turns=turns, budget=budget, device=device, warm=warm)}


def read_prompt(model: PreTrainedModel, prompt: Tensor, chunk: int) -> None:
    state = linearized.new_state(model)
    for part in prompt.split(chunk, dim=1):
        linearized.extend(model, part, state, logits_to_keep=1)


@torch.no_grad()
def _forward(model: PreTrainedModel, prompt: Tensor) -> None:
    model(input_ids=prompt, use_cache=True, logits_to_keep=1)


def _show_constant(found: dict[str, Any], console: Console) -> None:
    first = next(iter(found["time"].values())).median
    rows = [
        [f"{int(n):,}", str(timing), f"{timing.median / first:.3f}", f"{found['bytes'][n]:,}"]
        for n, timing in found["time"].items()
    ]
    columns = ["context", "time (quartiles)", "× of the first", "bytes of state"]
    show("Ours, one token", columns, rows, console)


def _show_decode(found: dict[int, Any], console: Console) -> None:
    rows = []
    for context, result in found.items():
        times: dict[str, Timing] = result["time"]
        for name, timing in times.items():
            rows.append([
                f"{context:,}", name, str(timing), _faster(times, name),
                f"{result['bytes'][name]:,}",
            ])  # fmt: skip
    columns = ["context", "", "time (quartiles)", "ours is faster", "bytes of state or cache"]
    show("Decoding, one token", columns, rows, console)


def _show_hybrid(found: dict[int, Any], decode: dict[int, Any], console: Console) -> None:
    """Beside the softmax twin's token, with the better of its caches."""
    rows = []
    for context, result in sorted(found.items()):
        softmax = min(decode[context]["time"][name].median for name in (DYNAMIC, STATIC))
        each = {name: timing.median / hybrids.NEW for name, timing in result["texts"].items()}
        each |= {f"a step of {n}": timing.median for n, timing in result["steps"].items()}
        for name, seconds in each.items():
            rows.append([
                f"{context:,}", name, f"{seconds * 1e3:.2f} ms", f"{softmax * 1e3:.2f} ms",
                f"{softmax / seconds:.2f} ×", f"{result['bytes']:,}",
            ])  # fmt: skip
    columns = ["context", "", "a token or a step", "softmax, a token", "faster", "bytes of state"]
    show("One softmax layer in four", columns, rows, console)


def _faster(times: dict[str, Timing], name: str) -> str:
    """Than ours, packed and compiled or not as this one is."""
    if name.startswith(OURS):
        return ""
    return f"{times[name].median / times[OURS + _kind(name)].median:.2f} ×"


def _kind(name: str) -> str:
    return next(kind for kind in (COMPILED, PACKED, "") if name.endswith(kind))


def _show_trees(found: dict[str, Timing], console: Console) -> None:
    rows = []
    for name, timing in found.items():
        single = found["1" + _kind(name)].median
        rows.append([name, str(timing), f"{timing.median / single:.2f}"])
    show("Verifying a tree", ["nodes", "time (quartiles)", "× of one"], rows, console)


def _show_prefill(found: dict[int, Any], console: Console) -> None:
    rows = []
    for tokens, result in found.items():
        times: dict[str, Timing] = result["time"]
        for name, timing in times.items():
            speed = f"{tokens / timing.median:,.0f}"
            rows.append([f"{tokens:,}", name, str(timing), speed, _faster(times, name)])
    columns = ["prompt", "", "time (quartiles)", "tokens/s", "ours is faster"]
    show("Prefill", columns, rows, console)


def _bars(constant: dict[str, Any], decode: dict[int, Any], prefill: dict[int, Any]) -> list[Bar]:
    """Like with like: packed against packed, compiled against compiled."""
    growth = size = filled = None
    if {"1024", "32768"} <= set(constant["time"]):
        growth = constant["time"]["32768"].median / constant["time"]["1024"].median
        size = constant["bytes"]["32768"] / constant["bytes"]["1024"]
    bars = [
        Bar("decoding at 32K over 1K, time", growth, 1.05, least=False),
        Bar("decoding at 32K over 1K, bytes", size, 1, least=False),
    ]
    for kind in ("", PACKED, COMPILED):
        faster = None
        times = decode.get(32768, {}).get("time", {})
        if OURS + kind in times:
            rivals = [name + kind for name in (DYNAMIC, STATIC) if name + kind in times]
            best = min(times[name].median for name in rivals)
            faster = best / times[OURS + kind].median
        bars.append(Bar(f"decoding at 32K, × the better softmax cache{kind}", faster, 5))
    if 32768 in prefill:
        times = prefill[32768]["time"]
        filled = times[SOFTMAX].median / times[OURS].median
    return [*bars, Bar("prefill of 32K, × softmax", filled, 2.5)]


if __name__ == "__main__":
    typer.run(main)
