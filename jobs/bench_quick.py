"""The few ratios by which machines can be compared, in about four minutes.

    make bench-quick                       # or: python -m jobs.bench_quick
    python -m jobs.bench_quick --quick     # seconds; for a look, not for figures

One random Llama of 47M parameters and its linear twin. Steps of 1, 8 and 16 nodes and prompts, with
eager torch and with `linearized.pack`; prompts beside a plain matrix product, which is what the
processor can do. Then whole texts, prompts included: our engine beside transformers' continuous
batching of the softmax twin, in the same process and in turns. "bfloat16" is
`linearized.pack(model, dtype=torch.bfloat16)`, which changes numbers, and is not what the bars are
about. Ends with one line of JSON.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

import linearized
from jobs import measure
from jobs.bench_models import NODES, read_prompt, state_of, twins_of
from jobs.measure import Bar, Machine, Run, Timing, in_turns, last_line, show, show_bars
from linearized.speculative import Engine, Sampling, Text

CPU = torch.device("cpu")
EAGER, PACKED, BFLOAT16 = "eager", "packed", "bfloat16"
COMPILED = "packed and compiled"
MATRIX, SOFTMAX = "matrix product", "softmax twin"
BATCHED, GENERATE = "transformers, continuous batching", "transformers, generate one by one"
CHUNK = 512
"""Tokens of a prompt that are read at once, as in serving."""
SIDE = 2048
"""Of the matrices whose product is what the processor can do."""
CONTEXT = 1024
Models = dict[str, PreTrainedModel]
Prompts = list[list[int]]
Answer = Callable[[Prompts], None]


def main(
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's own choice.")] = 0,
    turns: Annotated[int, typer.Option(help="Turns of each contestant.")] = 15,
    compile: Annotated[
        bool, typer.Option(help="Texts by compiled steps, too; takes two minutes more.")
    ] = False,
    quick: Annotated[bool, typer.Option(help="A tiny model, for a look.")] = False,
) -> None:
    """How fast this machine steps, reads and serves, as a few ratios."""
    if threads:
        torch.set_num_threads(threads)
    hidden, layers, prompt, new = (64, 2, 32, 8) if quick else (512, 12, 256, 64)
    turns = 2 if quick else turns
    console = measure.console()
    machine = Machine.measure(CPU, torch.float32)
    console.print(str(machine))
    softmax, linear = twins_of(hidden, layers, CPU)
    models = {EAGER: linear, PACKED: _sharing(linear), BFLOAT16: _sharing(linear)}
    packing = _pack(models)
    for name, (seconds, size) in packing.items():
        console.print(f"{name}: measured and laid out in {seconds:.1f} s, {size / 1e6:.0f} MB more")
    steps = {str(nodes): _steps(models, nodes, turns) for nodes in NODES}
    _show_steps(steps, console)
    length = 64 if quick else 2 * CHUNK
    prompts = _prompts({**models, SOFTMAX: softmax}, length, turns)
    shares = _shares(prompts, _work(linear, length))
    _show_prompts(prompts, shares, length, console)
    if compile:
        models[COMPILED] = _compiled(linear)
        console.print("compiling steps, before they are timed")
    texts = {str(n): _texts(softmax, models, n, prompt, new, turns) for n in (1, 8)}
    _show_texts(texts, new, console)
    bars = _bars(steps, shares[PACKED], texts)
    show_bars(bars, console)
    config = {
        "hidden": hidden, "layers": layers, "prompt": prompt, "new": new, "packing": packing,
    }  # fmt: skip
    results = {"steps": steps, "prompts": prompts, "shares": shares, "texts": texts}
    print(last_line("bench_quick", machine, config=config, results=results, bars=bars))


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own with the same weights in memory: what one has read into a cache is there
    for the other, too."""
    return copy.deepcopy(model, {id(one): one for one in model.parameters()})


def _pack(models: Models) -> dict[str, tuple[float, int]]:
    """Seconds and bytes."""
    found = {}
    for name, dtype in ((PACKED, torch.float32), (BFLOAT16, torch.bfloat16)):
        begin = time.perf_counter()
        size = linearized.pack(models[name], dtype=dtype)
        found[name] = time.perf_counter() - begin, size
    return found


def _compiled(model: PreTrainedModel) -> PreTrainedModel:
    twin = _sharing(model)
    linearized.pack(twin)
    linearized.compile(twin)
    return twin


def _steps(models: Models, nodes: int, turns: int) -> dict[str, Timing]:
    parents = torch.tensor([[-1, *((n - 1) // 2 for n in range(1, nodes))]])
    tokens = torch.ones_like(parents)
    runs: dict[str, Run] = {
        name: functools.partial(
            linearized.verify, model, tokens, parents, state_of(model, CONTEXT)
        )
        for name, model in models.items()
    }  # fmt: skip
    return in_turns(runs, turns=3 * turns, budget=15, device=CPU)


def _prompts(models: Models, tokens: int, turns: int) -> dict[str, Timing]:
    prompt = torch.randint(8192, (1, tokens))
    side = torch.randn(SIDE, SIDE)
    runs: dict[str, Run] = {MATRIX: lambda: side @ side}
    for name, model in models.items():
        run = _forward if name == SOFTMAX else functools.partial(read_prompt, chunk=CHUNK)
        runs[name] = functools.partial(run, model, prompt)
    return in_turns(runs, turns=turns, budget=25, device=CPU)


@torch.no_grad()
def _forward(model: PreTrainedModel, prompt: Tensor) -> None:
    model(input_ids=prompt, use_cache=True, logits_to_keep=1)


def _work(model: PreTrainedModel, tokens: int) -> int:
    """Floating-point operations of a prompt's products with weights; attention not counted."""
    linears = [one for one in model.modules() if type(one) is nn.Linear]
    head = model.get_output_embeddings()
    body = sum(one.weight.numel() for one in linears if one is not head)
    return 2 * body * tokens


def _shares(found: dict[str, Timing], work: int) -> dict[str, float]:
    """Of the matrix product's speed."""
    speed = 2 * SIDE**3 / found[MATRIX].median
    return {name: work / one.median / speed for name, one in found.items() if name != MATRIX}


def _texts(
    softmax: PreTrainedModel, models: Models, count: int, length: int, new: int, turns: int
) -> dict[str, Timing]:
    """So many texts at once, from their prompts to their last tokens. transformers' batching runs
    in a thread that keeps asking for work and slows our turns while it waits: it is started for
    its own turns, warmed up, and stopped again."""
    generator = torch.Generator().manual_seed(count)
    ours = {
        kind: functools.partial(_ours, Engine(model, rows=count), new)
        for kind, model in models.items()
    }
    seconds: dict[str, list[float]] = {}

    def run(name: str, answer: Answer, *, warm: bool = False) -> None:
        prompts = torch.randint(1, 8192, (count, length), generator=generator).tolist()
        began = time.perf_counter()
        answer(prompts)
        if not warm:
            seconds.setdefault(name, []).append(time.perf_counter() - began)

    for kind, answer in ours.items():
        run(kind, answer, warm=True)
    for _ in range(min(turns, 5)):
        with _transformers(softmax, count, length, new) as (name, theirs):
            run(name, theirs, warm=True)
            run(name, theirs)
        for kind, answer in ours.items():
            run(kind, answer)
    return {name: Timing.of(times) for name, times in seconds.items()}


def _ours(engine: Engine, new: int, prompts: Prompts) -> None:
    for prompt in prompts:
        engine.add(Text(prompt, sampling=Sampling(), max_new_tokens=new))
    while engine.busy:
        engine.step()


@contextmanager
def _transformers(
    model: PreTrainedModel, count: int, length: int, new: int
) -> Iterator[tuple[str, Answer]]:
    """Its continuous batching of so many texts at once, or, in versions without it, its
    `generate`."""
    settings = transformers.GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    twin: Any = _sharing(model)  # its attention is another one there
    try:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        pages = count * (2 + (length + new) // 256)
        config = ContinuousBatchingConfig(
            num_blocks=pages, max_batch_tokens=CHUNK, allow_block_sharing=False
        )
        open_manager = twin.continuous_batching_context_manager
    except (ImportError, TypeError, AttributeError):

        def one_by_one(prompts: Prompts) -> None:
            for prompt in prompts:
                twin.generate(torch.tensor([prompt]), generation_config=settings)

        yield GENERATE, one_by_one
        return
    with open_manager(generation_config=settings, continuous_batching_config=config) as manager:
        yield BATCHED, functools.partial(_batched, manager, new)


def _batched(manager: Any, new: int, prompts: Prompts) -> None:
    manager.add_requests(prompts, max_new_tokens=new)
    left = len(prompts)
    while left:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("transformers' continuous batching ended before its texts")
        elif result.is_finished():
            left -= 1


def _show_steps(found: dict[str, dict[str, Timing]], console: Console) -> None:
    rows = [
        [nodes, name, str(timing), f"{timing.median / times[EAGER].median:.2f}"]
        for nodes, times in found.items()
        for name, timing in times.items()
    ]
    columns = ["nodes", "", "time (quartiles)", "× of eager"]
    show(f"A step at {CONTEXT:,} tokens", columns, rows, console)


def _show_prompts(
    found: dict[str, Timing], shares: dict[str, float], length: int, console: Console
) -> None:
    rows = [
        [name, str(found[name]), f"{length / found[name].median:,.0f}", f"{share:.0%}"]
        for name, share in shares.items()
    ]
    columns = ["", "time (quartiles)", "tokens/s", "share of the matrix product's speed"]
    show(f"Reading a prompt of {length:,} tokens", columns, rows, console)


def _show_texts(found: dict[str, dict[str, Timing]], new: int, console: Console) -> None:
    rows = []
    for count, times in found.items():
        rival = _rival(times)
        for name, timing in times.items():
            speed = int(count) * new / timing.median
            times_rival = f"{times[rival].median / timing.median:.2f}"
            rows.append([count, name, str(timing), f"{speed:,.1f}", times_rival])
    columns = ["texts", "", "time (quartiles)", "tokens/s", "× transformers"]
    show(f"Texts of {new} new tokens, prompts included", columns, rows, console)


def _bars(
    steps: dict[str, dict[str, Timing]], share: float, texts: dict[str, dict[str, Timing]]
) -> list[Bar]:
    bars = [
        Bar(
            f"a step of {nodes} nodes, packed, × of eager",
            times[PACKED].median / times[EAGER].median,
            1.05,
            least=False,
        )
        for nodes, times in steps.items()
    ]
    bars.append(Bar("reading a prompt, share of the matrix product's speed", share, 0.6))
    for count, bound in (("1", 1.3), ("8", 2.0)):
        times = texts[count]
        ours = COMPILED if COMPILED in times else PACKED
        ratio = times[_rival(times)].median / times[ours].median
        bars.append(Bar(f"texts, {count} at once, {ours}, × {_rival(times)}", ratio, bound))
    return bars


def _rival(times: dict[str, Timing]) -> str:
    return BATCHED if BATCHED in times else GENERATE


if __name__ == "__main__":
    typer.run(main)
