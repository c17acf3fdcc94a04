"""Speculative decoding against plain decoding of the same target, drafter by drafter.

    python -m jobs.pair bench            # once: trains what is measured
    python -m jobs.medusa bench          # and, if they are to be measured, too, the other drafters:
    python -m jobs.layers bench
    python -m jobs.prune bench
    python -m jobs.bench_decode          # ten minutes on two CPU cores; with more `--texts`, longer
    python -m jobs.bench_decode --quick  # a minute or two; for a look, not for figures

On held-out prompts, greedy and sampled, from one text at a time to eight: tokens per second, what
was drafted and accepted, where the time went; and, so that a target that repeats itself cannot
flatter the figures, how often the draft agrees with it on text that neither has written, and how
much of what was generated repeats itself. Beside it transformers' assisted generation on the
softmax twins. Ends with one line of JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from jobs.measure import Bar, Machine, in_turns, last_line, show, show_bars
from linearized.errors import LinearizedError
from linearized.medusa import MedusaHeads
from linearized.models import decoder
from linearized.speculative import (
    Ask,
    Drafter,
    Engine,
    LayersDrafter,
    MedusaDrafter,
    ModelDrafter,
    NgramDrafter,
    Sampling,
    Text,
    TokenTree,
)
from linearized.training.blocks import Blocks

PLAIN = "plain"
STDLIB = "standard library"
Prompts = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    model: PreTrainedModel
    drafters: dict[str, Callable[[], list[Drafter]]]
    """A fresh one for each engine."""
    prompts: dict[str, Prompts]
    batches: list[int]
    tokens: int
    groups: int
    """Of prompts, for every case."""
    max_nodes: int


def main(
    run: Annotated[Path, typer.Option(help="What jobs.pair made.")] = Path("runs/bench"),
    texts: Annotated[
        list[Path] | None, typer.Option(help="More prompts: text, or MT-Bench's JSON Lines.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Texts at a time, with commas between.")] = "1,2,4,8",
    tokens: Annotated[int, typer.Option(help="New tokens of a text.")] = 128,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 96,
    groups: Annotated[int, typer.Option(help="Groups of prompts a case.")] = 4,
    max_nodes: Annotated[int, typer.Option(help="Of a tree.")] = 16,
    compile: Annotated[bool, typer.Option(help="Compile the steps of target and draft.")] = True,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's own choice.")] = 0,
    quick: Annotated[bool, typer.Option(help="Short texts, few of them, not compiled.")] = False,
) -> None:
    """Tokens per second of the engine with each drafter."""
    if threads:
        torch.set_num_threads(threads)
    if quick:
        batches, tokens, groups, compile = "1,2", 24, 1, False
    console = measure.console()
    try:
        sizes = [int(batch) for batch in batches.split(",")]
        prompts = _prompts(run, texts or [], max(sizes) * groups, prompt)
        model = _ready(run / "target", compile)
        drafters, draft = _drafters(run, model, compile, console)
    except (ValueError, LinearizedError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    machine = Machine.measure(model.device, torch.float32)
    console.print(str(machine))
    setting = Setting(
        model=model,
        drafters=drafters,
        prompts=prompts,
        batches=sizes,
        tokens=tokens,
        groups=groups,
        max_nodes=max_nodes,
    )
    results: dict[str, Any] = {"agreement": _agreement(run, model, draft, console)}
    results["step"] = _step(model, console)
    results["cases"] = _cases(setting, console)
    results["twins"] = _twins(run, setting, console)
    bars = _bars(results)
    show_bars(bars, console)
    config = {"tokens": tokens, "prompt": prompt, "groups": groups, "compiled": compile}
    print(last_line("bench_decode", machine, config=config, results=results, bars=bars))


def _ready(folder: Path, compile: bool) -> PreTrainedModel:
    model = linearized.load(folder)
    model.requires_grad_(False)
    linearized.pack(model)
    if compile:
        linearized.compile(model)
    return model


def _drafters(
    run: Path, model: PreTrainedModel, compile: bool, console: Console
) -> tuple[dict[str, Callable[[], list[Drafter]]], PreTrainedModel]:
    """By name; those that nobody has made are left out, and said so."""
    draft = _ready(run / "draft", compile)
    found: dict[str, Callable[[], list[Drafter]]] = {
        "model": lambda: [ModelDrafter(draft)],
        "ngram": lambda: [NgramDrafter()],
        "model, then ngram": lambda: [ModelDrafter(draft), NgramDrafter()],
        "useless model": lambda: [_Useless(draft)],
    }
    if (run / "pruned").exists():
        pruned = _ready(run / "pruned", compile)
        found["pruned"] = lambda: [ModelDrafter(pruned)]
    if (run / "softmax_draft").exists():
        softmax = decoder(linearized.load(run / "softmax_draft"))
        linearized.pack(softmax)
        found["softmax model"] = lambda: [ModelDrafter(softmax)]
    if (run / "target" / "medusa").exists():
        heads = MedusaHeads.from_pretrained(run / "target" / "medusa")
        linearized.pack(heads)
        found["medusa"] = lambda: [MedusaDrafter(model, heads)]
    if (run / "target" / "layers.json").exists():
        found["layers"] = lambda: [LayersDrafter.from_pretrained(run / "target")]
    missing = {"pruned", "softmax model", "medusa", "layers"} - found.keys()
    if missing:
        console.print(f"not there, and not measured: {', '.join(sorted(missing))}")
    return found, draft


class _Useless(ModelDrafter):
    """As sure and as slow as the draft, and always wrong."""

    def propose(self, asks: Sequence[Ask]) -> list[TokenTree]:
        size = self.model.config.vocab_size
        return [
            TokenTree(tuple((t + 1) % size for t in tree.tokens), tree.parents, tree.scores)
            for tree in super().propose(asks)
        ]


def _prompts(run: Path, texts: list[Path], count: int, length: int) -> dict[str, Prompts]:
    """From the standard library's held-out files, and from other texts."""
    blocks = Blocks(run / "data" / "held_out")
    if length > blocks.block:
        raise ValueError(f"a prompt has at most {blocks.block} tokens here, got {length}")
    count = min(count, len(blocks))
    spread = [i * len(blocks) // count for i in range(count)]
    found = {STDLIB: blocks.rows(spread)[:, :length].tolist()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "target")
    for path in texts:
        found[path.stem] = [tokens[:length] for tokens in _pieces(path, tokenizer, count, length)]
    return found


def _pieces(path: Path, tokenizer: Any, count: int, length: int) -> Prompts:
    """Of a text, places spread over it; of JSON Lines, the first turn of each."""
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        pieces = [line["turns"][0] for line in lines]
    else:
        text = path.read_text()
        places = [i * len(text) // (count + 1) for i in range(count)]
        pieces = [text[place : place + 16 * length] for place in places]
    return [tokenizer(piece)["input_ids"][:length] for piece in pieces[:count]]


@torch.no_grad()
def _agreement(
    run: Path, model: PreTrainedModel, draft: PreTrainedModel, console: Console
) -> dict[str, float]:
    """Under teacher forcing, on held-out text."""
    blocks = Blocks(run / "data" / "held_out")
    rows = [i * len(blocks) // 32 for i in range(32)]
    same = covered = right = count = 0
    for start in range(0, 32, 8):
        tokens = blocks.rows(rows[start : start + 8])
        said = model(input_ids=tokens, use_cache=False).logits.argmax(-1)
        guessed = draft(input_ids=tokens, use_cache=False).logits.topk(4, dim=-1).indices
        same += int((guessed[..., 0] == said).sum())
        covered += int((guessed == said[..., None]).sum())
        right += int((said[:, :-1] == tokens[:, 1:]).sum())
        count += said.numel()
    found = {
        "draft is the target": same / count,
        "target in the draft's best four": covered / count,
        "target is the text": right / count,
    }
    rows_ = [[name, f"{value:.3f}"] for name, value in found.items()]
    show("On held-out text, the best tokens", ["", "share"], rows_, console)
    return found


@torch.no_grad()
def _step(model: PreTrainedModel, console: Console) -> dict[str, Any]:
    """A step of the engine, one text and no draft, against its matrix products alone."""
    linears = [module for module in model.modules() if type(module) is torch.nn.Linear]
    inputs = {size: torch.randn(1, 1, size) for size in {one.in_features for one in linears}}

    def products() -> None:
        for linear in linears:
            linear(inputs[linear.in_features])

    engine = Engine(model, rows=1)
    text = Text([1] * 40, sampling=Sampling(), max_new_tokens=100_000)
    engine.add(text)
    for _ in range(20):
        engine.step()
    engine.seconds.clear()
    times = in_turns(
        {"a step": engine.step, "its matrix products": products},
        turns=60, budget=20, device=model.device,
    )  # fmt: skip
    outside = engine.seconds["commit"] + engine.seconds["rest"] + engine.seconds["read"]
    share = (outside + engine.seconds["draft"]) / sum(engine.seconds.values())
    ratio = times["a step"].median / times["its matrix products"].median
    rows = [[name, str(timing)] for name, timing in times.items()]
    rows += [["ratio", f"{ratio:.2f}"], ["outside of the forward", f"{share:.1%}"]]
    show("One text, no draft", ["", "time (quartiles)"], rows, console)
    return {"time": times, "ratio": ratio, "outside": share}


@dataclass
class _Case:
    """What one contestant did with the groups of prompts so far."""

    engine: Engine
    speeds: list[float] = field(default_factory=list)
    """Tokens a second, a group each."""
    ratios: list[float] = field(default_factory=list)
    """The same, over that of plain decoding just before and just after; of plain decoding itself,
    what chance does."""
    texts: list[Text] = field(default_factory=list)

    def result(self, plain: _Case) -> dict[str, Any]:
        drafted, accepted = Counter[int](), Counter[int]()
        for text in self.texts:
            drafted.update(text.drafted)
            accepted.update(text.accepted)
        rounds = sum(text.rounds for text in self.texts)
        tokens = sum(len(text.new_tokens) for text in self.texts)
        total = sum(self.engine.seconds.values())
        return {
            "tokens_per_second": statistics.median(self.speeds),
            "over_plain": statistics.median(self.ratios),
            "ratios": self.ratios,
            "tokens_per_round": tokens / rounds,
            "drafted": dict(drafted),
            "accepted": dict(accepted),
            "shares": {what: spent / total for what, spent in self.engine.seconds.items()},
            "repeated": statistics.mean(_repeated(text.new_tokens) for text in self.texts),
            "same_text": all(
                mine.new_tokens == base.new_tokens
                for mine, base in zip(self.texts, plain.texts, strict=True)
            ),
        }


def _repeated(tokens: list[int], size: int = 8) -> float:
    """Share of 8-grams that the text has had before."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _cases(setting: Setting, console: Console) -> list[dict[str, Any]]:
    found = []
    for corpus, prompts in setting.prompts.items():
        for batch in setting.batches:
            for temperature in (0.0, 0.8):
                found += _compare(setting, corpus, prompts, batch, temperature)
        _show_cases(corpus, found, console)
    return found


def _compare(
    setting: Setting, corpus: str, prompts: Prompts, batch: int, temperature: float
) -> list[dict[str, Any]]:
    """All contestants, in turns, on the same groups of prompts, with plain decoding before, after
    and between them: what else the machine does changes by the second. They keep what they have
    learnt of how well they draft, as a server would; one group before the first is for that."""
    makers = {PLAIN: list, **setting.drafters}
    cases = {}
    costs = None
    for name, make in makers.items():
        engine = Engine(setting.model, drafters=make(), rows=batch, max_nodes=setting.max_nodes)
        costs = costs or engine.measure()
        engine.plan(costs)
        cases[name] = _Case(engine)
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)][: setting.groups]
    for turn, group in enumerate([groups[0], *groups]):
        names = list(setting.drafters)
        names = names[turn % len(names) :] + names[: turn % len(names)]
        found: list[tuple[str, float, list[Text]]] = []
        for name in _with_plain_between(names):
            found.append((name, *_generate(cases[name].engine, group, setting.tokens, temperature)))
        if not turn:
            for case in cases.values():
                case.engine.seconds.clear()
            continue
        plains = [(place, speed) for place, (name, speed, _) in enumerate(found) if name == PLAIN]
        for place, (name, speed, texts) in enumerate(found):
            case = cases[name]
            case.speeds.append(speed)
            before = [base for at, base in plains if at < place][-1:]
            after = [base for at, base in plains if at > place][:1]
            case.ratios.append(speed / statistics.mean(before + after))
            if name != PLAIN or place == 0:
                case.texts += texts
    about = {"corpus": corpus, "batch": batch, "temperature": temperature}
    return [{**about, "drafter": name, **case.result(cases[PLAIN])} for name, case in cases.items()]


def _with_plain_between(names: list[str]) -> list[str]:
    found = [PLAIN]
    for place, name in enumerate(names, start=1):
        found.append(name)
        if place % 3 == 0 or place == len(names):
            found.append(PLAIN)
    return found


def _generate(
    engine: Engine, prompts: Prompts, tokens: int, temperature: float
) -> tuple[float, list[Text]]:
    """Tokens a second from when all prompts are read, and the texts. No text ends early."""
    texts = [
        Text(prompt, sampling=Sampling(temperature=temperature, seed=i), max_new_tokens=tokens)
        for i, prompt in enumerate(prompts)
    ]
    for text in texts:
        engine.add(text)
    before = 0
    began = time.perf_counter()
    while engine.busy:
        reading = engine.reading
        engine.step()
        if reading:  # the round that read the last prompt does not count
            before = sum(len(text.new_tokens) for text in texts)
            began = time.perf_counter()
    done = sum(len(text.new_tokens) for text in texts) - before
    return done / (time.perf_counter() - began), texts


@torch.no_grad()
def _twins(run: Path, setting: Setting, console: Console) -> dict[str, Any]:
    """transformers on the softmax models, one text at a time: alone, and assisted by the draft."""
    if not (run / "softmax_draft").exists():
        console.print("no softmax draft: transformers' assisted generation is not measured")
        return {}
    transformers.logging.set_verbosity_error()  # it warns of how it calls itself
    model, draft = (linearized.load(run / name) for name in ("teacher", "softmax_draft"))
    for one in (model, draft):
        linearized.pack(one)
        one.generation_config.eos_token_id = None
    found: dict[str, Any] = {}
    for temperature in (0.0, 0.8):
        speeds: dict[str, list[float]] = {"alone": [], "assisted": []}
        for turn, prompt in enumerate(setting.prompts[STDLIB][: setting.groups + 1]):
            for name, assistant in (("alone", None), ("assisted", draft)):
                torch.manual_seed(turn)
                speed = _assisted(model, assistant, prompt, setting.tokens, temperature)
                if turn:
                    speeds[name].append(speed)
        found[str(temperature)] = {name: statistics.median(all_) for name, all_ in speeds.items()}
    rows = [
        [temperature, name, f"{speed:.1f}", f"{speed / by_name['alone']:.2f} ×"]
        for temperature, by_name in found.items()
        for name, speed in by_name.items()
    ]
    columns = ["temperature", "", "tokens/s", "over alone"]
    show("transformers on the softmax twins, one text", columns, rows, console)
    return found


def _assisted(
    model: PreTrainedModel,
    assistant: PreTrainedModel | None,
    prompt: list[int],
    tokens: int,
    temperature: float,
) -> float:
    """Tokens a second."""
    settings: dict[str, Any] = {"do_sample": False}
    if temperature:
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    ids = torch.tensor([prompt])
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
            f"{case['repeated']:.0%}", "yes" if case["same_text"] else "NO",
        ])  # fmt: skip
    columns = [
        "texts", "temp.", "drafter", "tokens/s", "over plain (lowest–highest)", "tokens a round",
        "accepted/drafted by depth", "draft verify commit rest", "repeated", "text as plain",
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
    worst = min(case["over_plain"] for case in results["cases"] if case["drafter"] != PLAIN)
    many = plain[8] / plain[1] if {1, 8} <= plain.keys() else None
    return [
        Bar("one text, greedy, `model` over plain", ratio(0.0), 2.0),
        Bar("one text, temperature 0.8, `model` over plain", ratio(0.8), 1.6),
        Bar("the worst case of the grid over plain", worst, 0.97),
        Bar("eight texts over one, plain, tokens a second", many, 4),
        Bar("a plain step over its matrix products", results["step"]["ratio"], 1.35, least=False),
        Bar("share of a plain step outside of the forward", results["step"]["outside"], 0.1,
            least=False),
    ]  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
