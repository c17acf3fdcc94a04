"""What a training run would take, before it is started: tokens, parameters, memory by ZeRO stage,
time. Counts are exact; memory and time are estimates and say so. Nothing is trained, and no weights
are read.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import yaml
from rich.console import Console
from rich.table import Table

from jobs import models
from jobs.pruning import Pruning
from jobs.run import FlashShape, Heads, Run, Stage
from linearized.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

BLOCK, VOCABULARY = 4096, 32_000
"""Assumed where there is no data yet."""
SHARE = 0.4
"""Of the rate of a large matrix product, what training reaches: a guess that errs by up to two."""
GPU_FLOPS = 4e14
"""Assumed of a GPU that is not here: about 40 % of what an H100 is said to do in bfloat16."""
PRODUCT_S = 0.5
"""Seconds for which products are measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Of a model, in parameters."""

    all: int
    matrices: int
    """Of its linear layers, without the output matrix: what a token is multiplied with."""
    attention: int
    """Of attention modules alone."""
    head: int
    """The output matrix."""
    new: int
    """Those that linearizing adds."""
    low_rank: int
    """Numbers of rows and columns of its linear layers: LoRA has `rank` times as many."""
    hidden: int
    layers: int
    inner: int
    """Width of the feed-forward layers."""


def show(made: Run | list[Any]) -> None:
    """Print the plan of a run, or of that which a recipe's steps end with."""
    steps = made if isinstance(made, list) else [made]
    run: Run = steps[-1]
    cut = [step for step in steps if isinstance(step, Pruning)]
    console = Console(highlight=False, soft_wrap=True, width=100)
    console.print(yaml.safe_dump(_plain(asdict(run)), sort_keys=False), markup=False)
    block, assumed = _block(run)
    if cut:
        console.print(f"{cut[0].out} is cut out of {cut[0].target} first, which the plan counts as")
        console.print("if nothing were cut\n")
    if assumed:
        console.print(f"{run.data} is not there yet: blocks of {BLOCK:,} tokens are assumed\n")
    teacher = None if run.teacher is None else size_of(_outline(run.teacher, run))
    student = _student(run, teacher, cut)
    per_stage = [
        stage.steps * stage.batch * min(stage.context or block, block) for stage in run.stages
    ]
    named = zip(run.stages, per_stage, strict=True)
    each = ", ".join(f"{stage.objective} {count / 1e6:,.2f}M" for stage, count in named)
    console.print(f"tokens      {sum(per_stage) / 1e6:,.2f}M ({each})")
    trained = [_trained(stage, student) for stage in run.stages]
    of = ", ".join(f"{count / 1e6:,.2f}M" for count in trained)
    console.print(f"parameters  {student.all / 1e6:,.2f}M; trained in each stage: {of}\n")
    console.print(_memory_table(run, block, student, teacher))
    console.print(_time(run, block, per_stage, student, teacher))


def size_of(model: Module) -> Size:
    """Counts of a model, which may be on torch's meta device."""
    import torch
    from torch import nn

    from linearized.models import new_parameters
    from linearized.slots import attention_modules

    config: Any = model.config
    new = {id(p) for p in new_parameters(model)}
    head = model.get_output_embeddings()  # type: ignore[operator]
    linear: list[Any] = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
        and not isinstance(module, nn.Embedding)
        and module is not head
    ]
    linear = [m for m in linear if m.weight.ndim == 2 and id(m.weight) not in new]
    attention = {id(p): p for m in attention_modules(model) for p in m.parameters()}
    return Size(
        all=sum(p.numel() for p in model.parameters()),
        matrices=sum(m.weight.numel() for m in linear),
        attention=sum(p.numel() for p in attention.values()),
        head=config.vocab_size * config.hidden_size,
        new=sum(p.numel() for p in model.parameters() if id(p) in new),
        low_rank=sum(sum(m.weight.shape) for m in linear if isinstance(m, nn.Linear)),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
    )


def memory(
    run: Run, zero: int, block: int, student: Size, teacher: Size | None
) -> dict[str, float]:
    """Bytes that each worker needs, by what for, in the stage that needs most."""
    share = run.workers.count
    width = 2 if run.workers.gpu else 4
    found = []
    for stage in run.stages:
        trained = _trained(stage, student)
        states = 12 if run.workers.gpu else 8  # a float32 copy, and Adam's two moments
        found.append(
            {
                "weights": student.all * width / (share if zero == 3 else 1),
                "gradients": trained * width / (share if zero >= 2 else 1),
                "optimizer": trained * states / (share if zero >= 1 else 1),
                "teacher": 0 if teacher is None else teacher.all * width,
                "activations": _activations(run, stage, block, student),
            }
        )
    return max(found, key=lambda one: sum(one.values()))


def operations(stage: Stage, student: Size, teacher: Size | None) -> float:
    """Floating-point operations of one token."""
    asked = 0.0 if teacher is None else 2.0 * (teacher.matrices + teacher.head)
    if stage.objective == "transfer" and teacher is not None:
        return 2.0 * teacher.matrices + 6.0 * student.attention
    if stage.objective == "medusa":
        return asked + 6.0 * student.matrices + 4.0 * student.head
    forward = 2.0 * (student.matrices + student.head)
    weights = 2.0 * min(_trained(stage, student), student.matrices + student.head)
    again = 2.0 * student.matrices if stage.checkpointing else 0.0
    return asked + 2 * forward + weights + again


def _trained(stage: Stage, student: Size) -> int:
    if stage.objective == "transfer":
        return student.attention
    if stage.lora is not None:
        return stage.lora.rank * student.low_rank + student.new
    if stage.trained == "attention":
        return student.attention
    return student.matrices + student.new if stage.trained == "layers" else student.all


def _activations(run: Run, stage: Stage, block: int, student: Size) -> float:
    """About: what the backward pass finds of each layer, and the logits."""
    rows = min(stage.micro or stage.batch, stage.batch // run.workers.count)
    tokens = rows * min(stage.context or block, block)
    width = 2 if run.workers.gpu or run.workers.autocast else 4
    attention = tokens * 12 * student.hidden * width
    if stage.objective == "transfer":  # nothing goes through feed-forward layers or logits
        return float(student.layers * attention)
    layer = attention + tokens * 3 * student.inner * width
    logits = tokens * (student.head // student.hidden) * (width + 8)
    kept = student.layers * layer
    if stage.checkpointing:
        kept = layer + student.layers * tokens * student.hidden * width
    return float(kept + logits)


def _memory_table(run: Run, block: int, student: Size, teacher: Size | None) -> Table:
    of = "GPU" if run.workers.gpu else "worker"
    table = Table(title=f"GB of memory for each {of}, about", title_justify="left", box=None)
    table.add_column("ZeRO")
    names = [*memory(run, 0, block, student, teacher), "all"]
    for name in names:
        table.add_column(name, justify="right")
    for zero in range(4):
        found = memory(run, zero, block, student, teacher)
        cells = [f"{value / 1e9:,.2f}" for value in (*found.values(), sum(found.values()))]
        chosen = " (this run)" if zero == run.workers.zero else ""
        table.add_row(f"{zero}{chosen}", *cells)
    return table


def _time(run: Run, block: int, tokens: list[int], student: Size, teacher: Size | None) -> str:
    each = zip(run.stages, tokens, strict=True)
    work = sum(operations(stage, student, teacher) * count for stage, count in each)
    evaluated = [student] if not isinstance(run.student, Path) else [student, student]
    evaluated += [] if teacher is None else [teacher]
    work += run.eval_blocks * block * sum(2.0 * (one.matrices + one.head) for one in evaluated)
    rate, how = _rate(run, student)
    seconds = work / (rate * run.workers.count)
    said = f"{seconds / 3600:,.1f} hours" if seconds > 5400 else f"{seconds / 60:,.0f} minutes"
    return f"\ntime        about {said}, an estimate: {work:.2g} operations, and {how}"


def _rate(run: Run, student: Size) -> tuple[float, str]:
    """Operations a second of one worker, and where that comes from."""
    import torch

    gpu = run.workers.gpu
    if gpu and not torch.cuda.is_available():
        return GPU_FLOPS, f"{GPU_FLOPS:.0e} a second of each GPU assumed; there is none here"
    device = "cuda" if gpu else "cpu"
    dtype = torch.bfloat16 if gpu or run.workers.autocast else torch.float32
    threads = torch.get_num_threads()
    torch.set_num_threads(run.workers.cpus)
    try:
        rows = torch.zeros(1024, student.hidden, dtype=dtype, device=device)
        matrix = torch.zeros(student.hidden, student.inner, dtype=dtype, device=device)
        best, end = float("inf"), time.perf_counter() + PRODUCT_S
        while time.perf_counter() < end:
            began = time.perf_counter()
            rows @ matrix
            if gpu:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    products = 2.0 * rows.numel() * matrix.shape[1] / best
    return SHARE * products, (
        f"{SHARE:.0%} of the {products:.2g} a second that matrix products reach here"
    )


def _student(run: Run, teacher: Size | None, cut: list[Pruning]) -> Size:
    import torch

    import linearized

    if isinstance(run.student, Heads):
        if teacher is None:
            raise ConfigError("Medusa's heads need a target, as the run's teacher")
        return _heads(run.student, teacher)
    if isinstance(run.student, Path):
        model = _outline(cut[0].target if cut else run.student, run)
    else:
        model = _scratch(run)
    if run.linear is not None:
        with torch.device("meta"):
            linearized.linearize(model, run.linear)
    return size_of(model)


def _heads(heads: Heads, teacher: Size) -> Size:
    """Each reads a hidden state and uses the target's output matrix."""
    matrices = heads.count * teacher.hidden**2
    return replace(
        teacher,
        all=matrices + heads.count * teacher.hidden,
        matrices=matrices,
        attention=0,
        head=heads.count * teacher.head,
        new=0,
        low_rank=0,
        layers=1,
    )


def _scratch(run: Run) -> PreTrainedModel:
    """The model of a run that starts from scratch."""
    import torch
    import transformers

    from jobs.train.models import _flash, _llama
    from linearized.training import tokenizer

    none = SimpleNamespace(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    folder = run.data / "tokenizer"
    vocabulary = len(tokenizer.load(folder)) if folder.is_dir() else VOCABULARY
    if run.teacher is not None:
        vocabulary = _outline(run.teacher, run).config.vocab_size
    make: Any = _flash if isinstance(run.student, FlashShape) else _llama
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(make(run.student, none, vocabulary))
    return cast("PreTrainedModel", model)


def _outline(model: Path, run: Run) -> PreTrainedModel:
    """Of a model on the Hub, its config is all that is fetched."""
    from linearized.folder import outline

    if model.exists():
        return outline(models.folder_of(model, run.out.parent / models.CACHE))
    return outline(model)


def _block(run: Run) -> tuple[int, bool]:
    """Tokens of a block, and whether they are assumed."""
    file = run.data / "data.json"
    if not file.exists():
        return BLOCK, True
    try:
        return int(json.loads(file.read_text())["block"]), False
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not of jobs.data; name the folder that it wrote") from error


def _plain(value: Any) -> Any:
    """As YAML can say it."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
