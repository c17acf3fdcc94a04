"""Speculative decoding against plain decoding of the same target, drafter by drafter.

    python -m jobs.pair bench            # once: trains what is measured
    python -m jobs.bench_decode          # on a machine that does nothing else; compiling is slow
    python -m jobs.bench_decode --quick  # for a look, not for figures

On held-out prompts, greedy and sampled, from one text at a time to eight: tokens per second, what
was drafted and accepted, where the time went; and, so that a target that repeats itself cannot
flatter the figures, how often each drafter agrees with it on text that neither has written, and how
much of what was generated repeats itself. Beside it transformers' assisted generation on the
softmax twins. Ends with one line of JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import linearized
from jobs import measure
from jobs.decoding import PLAIN, Contestants, Makers, Prompts, Ready, compare, generate
from jobs.measure import Bar, Machine, in_turns, last_line, show, show_bars
from linearized.compiled import is_compiled
from linearized.errors import ConfigError, DataError, LinearizedError
from linearized.speculative import Engine, ModelDrafter, Sampling, Text
from linearized.step import step
from linearized.training.blocks import Blocks
from linearized.tree import Tree

STDLIB = "standard library"
TEMPERATURES = (0.0, 0.8)


def main(
    run: Annotated[Path, typer.Option(help="What jobs.pair made.")] = Path("runs/bench"),
    texts: Annotated[
        list[Path] | None, typer.Option(help="More prompts: text, or MT-Bench's JSON Lines.")
    ] = None,
    drafter: Annotated[
        list[str] | None, typer.Option(help="Only this one; may be given again. Default: all.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Texts at a time, with commas between.")] = "1,2,4,8",
    tokens: Annotated[int, typer.Option(help="New tokens of a text.")] = 128,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 96,
    groups: Annotated[int, typer.Option(help="Groups of prompts a case.")] = 4,
    max_nodes: Annotated[int, typer.Option(help="Of a tree.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    compile: Annotated[bool, typer.Option(help="Compile the steps of target and drafts.")] = True,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's own choice.")] = 0,
    quick: Annotated[
        bool, typer.Option(help="One or two short texts, one group, not compiled.")
    ] = False,
) -> None:
    """Measure the engine's tokens per second with each drafter."""
    if threads:
        torch.set_num_threads(threads)
    if quick:
        batches, tokens, groups, compile = "1,2", 24, 1, False
    console = measure.console()
    try:
        sizes = _sizes(batches)
        _check(tokens=tokens, prompt=prompt, groups=groups, max_nodes=max_nodes)
        prompts = _prompts(run, texts or [], max(sizes) * (1 + groups), prompt)
        found = Contestants(run, Ready(device=_device(device), compile=compile))
        makers = _chosen(found.makers(), drafter or [])
    except (LinearizedError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    if found.missing:
        console.print(f"not there, and not measured: {', '.join(found.missing)}")
    machine = Machine.measure(found.model.device, torch.float32)
    console.print(str(machine))
    results: dict[str, Any] = {"agreement": _agreement(run, found, console)}
    results["step"] = _step(found.model, console)
    results["cases"] = cases = []
    for corpus, all_ in prompts.items():
        for batch in sizes:
            grouped = [all_[i : i + batch] for i in range(0, len(all_) - batch + 1, batch)]
            for temperature in TEMPERATURES:
                compared = compare(
                    found.model, makers, grouped[: 1 + groups],
                    tokens=tokens, max_nodes=max_nodes, temperature=temperature,
                )  # fmt: skip
                about = {"corpus": corpus, "batch": batch, "temperature": temperature}
                cases += [{**about, "drafter": name, **case} for name, case in compared.items()]
            _show_cases(corpus, [case for case in cases if case["batch"] == batch], console)
    results["twins"] = _twins(run, found, prompts[STDLIB], tokens, console)
    alone = [case["over_plain"] for case in cases if case["drafter"] == PLAIN]
    console.print(f"plain decoding over itself, case by case: {min(alone):.2f}–{max(alone):.2f} ×")
    bars = _bars(results)
    show_bars(bars, console)
    config = {
        "batches": sizes, "tokens": tokens, "prompt": prompt, "groups": groups,
        "max_nodes": max_nodes, "compiled": compile, "texts": [path.name for path in texts or []],
    }  # fmt: skip
    print(last_line("bench_decode", machine, config=config, results=results, bars=bars))


def _sizes(batches: str) -> list[int]:
    try:
        sizes = [int(batch) for batch in batches.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ConfigError(f"batches must be numbers from 1 on, like 1,2,4,8, got {batches!r}")
    return sizes


def _chosen(makers: Makers, names: list[str]) -> Makers:
    if unknown := [name for name in names if name not in makers]:
        raise ConfigError(f"no drafter {unknown[0]!r} here; choose among: {'; '.join(makers)}")
    return {name: makers[name] for name in names or makers}


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        least = 2 if name == "tokens" else 1  # the first comes from reading the prompt
        if size < least:
            raise ConfigError(f"{name.replace('_', '-')} must be at least {least}, got {size}")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; choose cpu, cuda or auto") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("this machine has no CUDA device; use --device cpu")
    return found


def _prompts(run: Path, texts: list[Path], count: int, length: int) -> dict[str, Prompts]:
    """From the standard library's held-out files, and from other texts: `count` of each."""
    blocks = Blocks(run / "data" / "held_out")
    if length > blocks.block:
        raise DataError(f"a prompt has at most {blocks.block} tokens here, got {length}")
    if count > len(blocks):
        raise DataError(f"{count} prompts are asked for, {len(blocks)} are held out; ask for fewer")
    spread = [i * len(blocks) // count for i in range(count)]
    found = {STDLIB: blocks.rows(spread)[:, :length].tolist()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "target")
    for path in texts:
        pieces = [tokenizer(piece)["input_ids"][:length] for piece in _pieces(path, count, length)]
        found[path.stem] = [tokens for tokens in pieces if tokens]
        if len(found[path.stem]) < count:
            raise DataError(
                f"{path} has {len(found[path.stem])} prompts, {count} are asked for; take smaller "
                "--batches or fewer --groups"
            )
    return found


def _pieces(path: Path, count: int, length: int) -> list[str]:
    """Of a text, places spread over it; of JSON Lines, the first turn of each."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        try:
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            return [str(line["turns"][0]) for line in lines][:count]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"{path} is not like MT-Bench: each line needs `turns`") from error
    places = [i * len(text) // (count + 1) for i in range(count)]
    return [text[place : place + 16 * length] for place in places]


def _agreement(run: Path, found: Contestants, console: Console) -> dict[str, Any]:
    blocks = Blocks(run / "data" / "held_out")
    rows = [i * len(blocks) // 32 for i in range(32)]
    where = found.model.device
    batches = [blocks.rows(rows[start : start + 8]).to(where) for start in range(0, 32, 8)]
    rates = found.agreements(batches)
    table = [
        [name, f"{first:.3f}", "–" if four is None else f"{four:.3f}"]
        for name, (first, four) in rates.items()
    ]
    title = "How often the target says the same, on held-out text"
    show(title, ["", "as the first guess", "as one of the first four"], table, console)
    return rates


@torch.no_grad()
def _step(model: PreTrainedModel, console: Console) -> dict[str, Any]:
    """A step of the engine, one text and no draft, against its forward and that one's matrix
    products alone."""
    linears = [module for module in model.modules() if type(module) is torch.nn.Linear]
    where: dict[str, Any] = {"device": model.device}
    inputs = {
        size: torch.randn(1, 1, size, **where) for size in {one.in_features for one in linears}
    }

    def products() -> None:
        for linear in linears:
            linear(inputs[linear.in_features])

    engine = Engine(model, rows=1)
    text = Text([1] * 40, sampling=Sampling(), max_new_tokens=100_000)
    engine.add(text)
    for _ in range(20):
        engine.step()
    state = linearized.new_state(model)
    linearized.extend(model, torch.ones(1, 32, dtype=torch.int64, **where), state)
    tree = Tree.chain(torch.ones(1, 1, dtype=torch.int64, **where))

    def forward() -> Tensor:
        return step(model, tree, state).logits

    times = in_turns(
        {"a step": engine.step, "its forward": forward, "its matrix products": products},
        turns=100, budget=20, device=model.device,
    )  # fmt: skip
    whole, inner, least = (times[name].median for name in times)
    rows = [[name, str(timing)] for name, timing in times.items()]
    rows += [["step / products", f"{whole / least:.2f}"]]
    rows += [["outside of the forward", f"{1 - inner / whole:.1%}"]]
    show("One text, no draft", ["", "time (quartiles)"], rows, console)
    return {"time": times, "ratio": whole / least, "outside": 1 - inner / whole}


@torch.no_grad()
def _twins(
    run: Path, found: Contestants, prompts: Prompts, tokens: int, console: Console
) -> dict[str, Any]:
    """One text at a time, reading the prompt included: transformers on the softmax models, alone
    and assisted by the draft, and ours. The first prompt is for warming up."""
    if not all((run / name).exists() for name in ("teacher", "softmax_draft")):
        console.print("no softmax twins: transformers' assisted generation is not measured")
        return {}
    transformers.logging.set_verbosity_error()  # it warns of how it calls itself
    ready = Ready(device=found.model.device, compile=False)
    teacher, assistant = (ready.load(run / name) for name in ("teacher", "softmax_draft"))
    for one in (teacher, assistant):
        one.generation_config.eos_token_id = None
    plain = Engine(found.model, rows=1)
    drafted = Engine(found.model, drafters=[ModelDrafter(found.models["model"])], rows=1)
    for engine in (plain, drafted):
        engine.plan(plain.measure())
    prompts = [prompts[0], *prompts[:8]]
    results: dict[str, Any] = {}
    for temperature in TEMPERATURES:
        runs: dict[str, Callable[[list[int]], float]] = {}
        for name, draft in (("transformers", None), ("transformers, assisted", assistant)):
            runs[name] = partial(_assisted, teacher, draft, tokens, temperature)
        for name, engine in (("ours", plain), ("ours, drafted", drafted)):
            runs[name] = partial(_ours, engine, tokens, temperature)
        speeds: dict[str, list[float]] = defaultdict(list)
        for turn, ids in enumerate(prompts):
            names = list(runs)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                torch.manual_seed(turn)
                speeds[name].append(runs[name](ids))
        results[str(temperature)] = {
            name: statistics.median(all_[1:]) for name, all_ in speeds.items()
        }
    rows = [
        [temperature, name, f"{speed:.1f}", f"{speed / by_name['transformers']:.2f} ×"]
        for temperature, by_name in results.items()
        for name, speed in by_name.items()
    ]
    columns = ["temperature", "", "tokens/s", "over transformers alone"]
    ways = "theirs packed, ours compiled, too" if is_compiled(found.model) else "all packed"
    title = f"One text, prompt included; softmax twins in transformers ({ways})"
    show(title, columns, rows, console)
    return results


def _ours(engine: Engine, tokens: int, temperature: float, prompt: list[int]) -> float:
    """Tokens a second."""
    return generate(engine, [prompt], tokens, temperature, reading=True)[0]


def _assisted(
    model: PreTrainedModel,
    assistant: PreTrainedModel | None,
    tokens: int,
    temperature: float,
    prompt: list[int],
) -> float:
    """Tokens a second."""
    settings: dict[str, Any] = {"do_sample": False}
    if temperature:
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    ids = torch.tensor([prompt], device=model.device)
    began = time.perf_counter()
    generate: Any = model.generate
    out: Tensor = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        assistant_model=assistant,
        pad_token_id=0,
        **settings,
    )
    return (out.shape[1] - len(prompt)) / (time.perf_counter() - began)


def _show_cases(corpus: str, cases: list[dict[str, Any]], console: Console) -> None:
    rows = []
    for case in cases:
        if case["corpus"] != corpus:
            continue
        depths = sorted(case["drafted"])
        drafted, accepted, shares = case["drafted"], case["accepted"], case["shares"]
        span = f"{min(case['ratios']):.2f}–{max(case['ratios']):.2f}"
        by_depth = " ".join(f"{accepted.get(d, 0)}/{drafted[d]}" for d in depths[:6])
        spent = [shares.get(what, 0.0) for what in ("draft", "verify", "commit", "rest")]
        rows.append([
            str(case["batch"]), str(case["temperature"]), case["drafter"],
            f"{case['tokens_per_second']:.1f}", f"{case['over_plain']:.2f} × ({span})",
            f"{case['tokens_per_round']:.2f}", by_depth,
            " ".join(f"{share:.0%}" for share in spent),
            f"{case['repeated']:.0%}", str(case["other_texts"]),
        ])  # fmt: skip
    columns = [
        "texts", "temp.", "drafter", "tokens/s", "over plain (lowest–highest)", "tokens a round",
        "accepted/drafted by depth", "draft verify commit rest", "repeated", "other texts",
    ]  # fmt: skip
    show(f"Decoding, {corpus}", columns, rows, console)


def _bars(results: dict[str, Any]) -> list[Bar]:
    def ratio(temperature: float) -> float | None:
        for case in results["cases"]:
            key = (case["corpus"], case["batch"], case["temperature"], case["drafter"])
            if key == (STDLIB, 1, temperature, "model"):
                return float(case["over_plain"])
        return None

    plain = {
        case["batch"]: case["tokens_per_second"]
        for case in results["cases"]
        if (case["corpus"], case["temperature"], case["drafter"]) == (STDLIB, 0.0, PLAIN)
    }
    drafted = [case for case in results["cases"] if case["drafter"] != PLAIN]
    worst = min(case["over_plain"] for case in drafted)
    others = sum(case["other_texts"] for case in drafted)
    many = plain[8] / plain[1] if {1, 8} <= plain.keys() else None
    return [
        Bar("one text, greedy, `model` over plain", ratio(0.0), 2.0),
        Bar("one text, temperature 0.8, `model` over plain", ratio(0.8), 1.6),
        Bar("the worst case of the grid over plain", worst, 0.97),
        Bar("texts that are not those of plain decoding", others, 0, least=False),
        Bar("eight texts over one, plain, tokens a second", many, 4),
        Bar("a plain step over its matrix products", results["step"]["ratio"], 1.35, least=False),
        Bar("share of a plain step outside of the forward", results["step"]["outside"], 0.1,
            least=False),
    ]  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
