"""What a step of distillation costs, and what makes it cheaper: forward of the teacher, forward and
backward of its linearized student, no optimizer, for the same tokens.

    python -m jobs.bench_distil path/to/model --row 2048 --threads 1

Every line of the table adds one thing to the line before it. Ends with one line of JSON.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from jobs import measure
from jobs.measure import Machine, Run, in_turns, last_line, show
from linearized.config import LinearConfig
from linearized.folder import load
from linearized.models import set_backend
from linearized.training.distil import choose, loss_from_hidden, loss_from_logits
from linearized.training.fit import student_of


def main(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a softmax model.")],
    attention: Annotated[str, typer.Option(help="How it is linearized.")] = "anchored",
    window: Annotated[int, typer.Option(help="Groups before a token's own.")] = 7,
    row: Annotated[int, typer.Option(help="Tokens of a step.")] = 2048,
    threads: Annotated[int, typer.Option(help="Torch's threads; 0: torch chooses.")] = 0,
    turns: Annotated[int, typer.Option(help="Turns of each contestant.")] = 2,
    float32: Annotated[bool, typer.Option(help="Also without autocast, the slowest.")] = True,
) -> None:
    """Tokens per second of distillation."""
    if threads:
        torch.set_num_threads(threads)
    console = measure.console()
    machine = Machine.measure(torch.device("cpu"), torch.float32)
    console.print(str(machine))
    teacher = load(model)
    config = LinearConfig.named(attention, window=window)
    student = student_of(teacher, config, shared=False).train()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(teacher.config.vocab_size, (1, row), generator=generator)
    contestants = _contestants(student, teacher, tokens)
    if not float32:
        del contestants["float32, all weights"]
    timings = in_turns(contestants, turns=turns, budget=1e9, device=torch.device("cpu"), warm=False)
    speeds = {name: row / timing.median for name, timing in timings.items()}
    rows = [[name, str(timings[name]), f"{speed:,.0f}"] for name, speed in speeds.items()]
    show(f"Distillation, rows of {row:,} tokens", ["", "a row (quartiles)", "tokens/s"], rows,
         console)  # fmt: skip
    settings = {"model": Path(model).name, "row": row, "linear": config.to_dict()}
    print(last_line("bench_distil", machine, config=settings, results=timings, speeds=speeds))


def _contestants(
    student: PreTrainedModel, teacher: PreTrainedModel, tokens: torch.Tensor
) -> dict[str, Run]:
    def step(loss: Any, *, trained: str, autocast: bool, backend: str | None) -> Run:
        def run() -> None:
            choose(student, teacher, trained)
            set_backend(student, backend)
            student.zero_grad(set_to_none=True)
            narrow = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
            with narrow:
                found = loss(student, teacher, tokens, 0.0)
            found.backward()

        return run

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            teacher.base_model(input_ids=tokens, use_cache=False)

    plain: dict[str, Any] = {"trained": "all", "autocast": True, "backend": "cpu"}
    return {
        "float32, all weights": step(loss_from_logits, **{**plain, "autocast": False}),
        "products in bfloat16": step(loss_from_logits, **plain),
        "… loss from hidden states": step(loss_from_hidden, **plain),
        "… attention in bfloat16": step(loss_from_hidden, **{**plain, "backend": None}),
        "… embeddings frozen": step(loss_from_hidden, **{**plain, "backend": None,
                                                         "trained": "layers"}),
        "… only attention learns": step(loss_from_hidden, **{**plain, "backend": None,
                                                             "trained": "attention"}),
        "the teacher's forward alone": forward,
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
