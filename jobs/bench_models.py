"""A linearized Llama against its softmax twin: prefill, decoding, trees, memory.

    python -m jobs.bench_models            # about twelve minutes on two CPU cores
    python -m jobs.bench_models --quick    # seconds; for a look, not for figures

Both have the same random weights; the linearized one's new parameters are random, too. Ours reads a
text in chunks with `linearized.extend`, as serving does, and decodes with `verify` and `commit` of
one token. The twin runs transformers' own forward with SDPA: prefill in one forward with a dynamic
cache, decoding with a dynamic and with a static cache. Contexts for decoding are not computed: the
caches are filled with random numbers, and so is our state, whose size does not depend on the length
that it is given. Prefill is computed in full. Ends with one line of JSON.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import linearized
from jobs import measure
from jobs.measure import Bar, Machine, Run, Timing, in_turns, last_line, show, show_bars
from linearized.models import new_parameters

OURS, DYNAMIC, STATIC = "ours", "softmax, dynamic cache", "softmax, static cache"
SOFTMAX = "softmax"
NODES = (1, 8, 16)


def main(
    contexts: Annotated[str, typer.Option(help="Tokens, with commas between.")] = "1024,8192,32768",
    prompts: Annotated[str, typer.Option(help="Prefill, tokens.")] = "2048,8192,32768",
    hidden: Annotated[int, typer.Option(help="Hidden width, a multiple of 64.")] = 512,
    layers: Annotated[int, typer.Option(help="Layers.")] = 12,
    chunk: Annotated[int, typer.Option(help="Tokens that ours reads at once.")] = 512,
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
        where = torch.device(device)
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(f"not understood: {error}") from error
    if hidden % 64:
        raise typer.BadParameter(f"hidden must be a multiple of 64, got {hidden}")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this machine has no CUDA device; use --device cpu")
    console = measure.console()
    machine = Machine.measure(where, torch.float32)
    console.print(str(machine))
    softmax, linear = _twins(hidden, layers, where)
    count = sum(p.numel() for p in softmax.parameters())
    console.print(f"{count / 1e6:.1f}M parameters, {layers} layers, hidden {hidden}")
    settings: dict[str, Any] = {"turns": turns, "budget": budget, "device": where}
    decode = {n: _decode(softmax, linear, n, **settings) for n in sizes}
    _show_decode(decode, console)
    trees = _trees(linear, sizes[0], **settings)
    _show_trees(trees, console)
    prefill = {n: _prefill(softmax, linear, n, chunk, **settings) for n in lengths}
    _show_prefill(prefill, console)
    bars = _bars(decode, prefill)
    show_bars(bars, console)
    config = {"parameters": count, "hidden": hidden, "layers": layers, "chunk": chunk}
    results = {"decode": decode, "trees": trees, "prefill": prefill}
    print(last_line("bench_models", machine, config=config, results=results, bars=bars))


def _twins(
    hidden: int, layers: int, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Random weights, float32; 47M parameters at hidden 512 and 12 layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 13 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1 << 17,
        tie_word_embeddings=True,
    )
    softmax = transformers.LlamaForCausalLM(config).eval().to(device)
    linear = copy.deepcopy(softmax)
    linearized.linearize(linear, linearized.LinearConfig(attention="grouped"))
    for parameter in new_parameters(linear):
        torch.nn.init.normal_(parameter, std=0.05)
    return softmax, linear


@torch.no_grad()
def _decode(
    softmax: PreTrainedModel,
    linear: PreTrainedModel,
    context: int,
    *,
    turns: int,
    budget: float,
    device: torch.device,
) -> dict[str, Any]:
    """A token after `context` of them."""
    token = torch.ones(1, 1, dtype=torch.int64, device=device)
    state = _state(linear, context)
    root = torch.full_like(token, -1)

    def ours() -> None:
        _, pending = linearized.verify(linear, token, root, state)
        linearized.commit(state, pending, [[0]])

    dynamic, static = _dynamic(softmax, context), _static(softmax, context)
    position = torch.full_like(token, context)

    def with_dynamic() -> None:
        softmax(input_ids=token, position_ids=position, past_key_values=dynamic, use_cache=True)
        dynamic.crop(-1)

    def with_static() -> None:
        for layer in static.layers:  # write the same slot again
            layer.cumulative_length.fill_(context)  # type: ignore[union-attr]
        softmax(input_ids=token, position_ids=position, past_key_values=static, use_cache=True)

    runs: dict[str, Run] = {OURS: ours, DYNAMIC: with_dynamic, STATIC: with_static}
    return {
        "time": in_turns(runs, turns=turns, budget=budget, device=device),
        "bytes": {OURS: state.nbytes, DYNAMIC: _bytes(dynamic), STATIC: _bytes(static)},
    }


def _state(linear: PreTrainedModel, context: int) -> linearized.DecodeState:
    """Of a text of this length, in the middle of a group."""
    state = linearized.new_state(linear)
    tensors = state.layers.tensors()
    tensors["memory"].normal_()
    tensors["tail"].normal_()
    half = state.layers.group // 2
    tensors["keys"][:, :, :, :half].normal_()
    tensors["values"][:, :, :, :half].normal_()
    tensors["length"].fill_(context // state.layers.group * state.layers.group + half)
    return state


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
    keys = torch.randn(shape, device=model.device)
    return keys, torch.randn_like(keys)


def _bytes(cache: transformers.Cache) -> int:
    layers: list[Any] = cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@torch.no_grad()
def _trees(
    linear: PreTrainedModel, context: int, *, turns: int, budget: float, device: torch.device
) -> dict[str, Timing]:
    """Trees of some nodes, verified by the whole model."""
    state = _state(linear, context)
    runs: dict[str, Run] = {}
    for nodes in NODES:
        parents = torch.tensor([[-1, *((n - 1) // 2 for n in range(1, nodes))]], device=device)
        tokens = torch.ones_like(parents)
        runs[str(nodes)] = lambda tokens=tokens, parents=parents: linearized.verify(  # type: ignore
            linear, tokens, parents, state
        )
    return in_turns(runs, turns=turns, budget=budget, device=device)


@torch.no_grad()
def _prefill(
    softmax: PreTrainedModel,
    linear: PreTrainedModel,
    tokens: int,
    chunk: int,
    *,
    turns: int,
    budget: float,
    device: torch.device,
) -> dict[str, Any]:
    """A prompt, to the logits of its last token."""
    prompt = torch.randint(8192, (1, tokens), device=device)

    def ours() -> None:
        state = linearized.new_state(linear)
        for part in prompt.split(chunk, dim=1):
            linearized.extend(linear, part, state, logits_to_keep=1)

    def theirs() -> None:
        softmax(input_ids=prompt, use_cache=True, logits_to_keep=1)

    if tokens > 8192:  # minutes a turn: warmed up by the shorter prompts, timed twice
        turns = 2
    runs: dict[str, Run] = {OURS: ours, SOFTMAX: theirs}
    warm = tokens <= 8192
    return {"time": in_turns(runs, turns=turns, budget=budget, device=device, warm=warm)}


def _show_decode(found: dict[int, Any], console: Console) -> None:
    rows = []
    for context, result in found.items():
        times: dict[str, Timing] = result["time"]
        for name, timing in times.items():
            ratio = timing.median / times[OURS].median
            rows.append([
                f"{context:,}", name, str(timing), "" if name == OURS else f"{ratio:.1f} ×",
                f"{result['bytes'][name]:,}",
            ])  # fmt: skip
    columns = ["context", "", "time (quartiles)", "ours is faster", "bytes of state or cache"]
    show("Decoding, one token", columns, rows, console)


def _show_trees(found: dict[str, Timing], console: Console) -> None:
    single = found["1"].median
    rows = [[n, str(timing), f"{timing.median / single:.2f}"] for n, timing in found.items()]
    show("Verifying a tree", ["nodes", "time (quartiles)", "× of one"], rows, console)


def _show_prefill(found: dict[int, Any], console: Console) -> None:
    rows = []
    for tokens, result in found.items():
        times: dict[str, Timing] = result["time"]
        for name, timing in times.items():
            ratio = timing.median / times[OURS].median
            rows.append([
                f"{tokens:,}", name, str(timing), f"{tokens / timing.median:,.0f}",
                "" if name == OURS else f"{ratio:.2f} ×",
            ])  # fmt: skip
    columns = ["prompt", "", "time (quartiles)", "tokens/s", "ours is faster"]
    show("Prefill", columns, rows, console)


def _bars(decode: dict[int, Any], prefill: dict[int, Any]) -> list[Bar]:
    growth = size = faster = filled = None
    if 1024 in decode and 32768 in decode:
        long, short = decode[32768], decode[1024]
        growth = long["time"][OURS].median / short["time"][OURS].median
        size = long["bytes"][OURS] / short["bytes"][OURS]
        best = min(long["time"][name].median for name in (DYNAMIC, STATIC))
        faster = best / long["time"][OURS].median
    if 32768 in prefill:
        times = prefill[32768]["time"]
        filled = times[SOFTMAX].median / times[OURS].median
    return [
        Bar("decoding at 32K over 1K, time", growth, 1.05, least=False),
        Bar("decoding at 32K over 1K, bytes", size, 1, least=False),
        Bar("decoding at 32K, × the better softmax cache", faster, 5),
        Bar("prefill of 32K, × softmax", filled, 2.5),
    ]


if __name__ == "__main__":
    typer.run(main)
