"""The folder that a run leaves: weights, tokenizer, run.json, card. Whole or not there at all."""

from __future__ import annotations

import glob
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from jobs import card
from jobs.run import Run
from jobs.train import engine, lora


def export(
    run: Run,
    student: nn.Module,
    adapters: Mapping[str, torch.Tensor],
    done: Mapping[str, Any],
    *,
    first: bool,
) -> None:
    """Write the result, in the place of an earlier one. All workers call this, since the weights
    may be shared out over them; the `first` one writes. `adapters` are those that were not merged.
    """
    state = _state(student, first)
    if not first:
        return
    disable_progress_bar()  # transformers would draw one into the lines of a job
    run.out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(run.out)
    part = _beside(run.out, "part")
    part.mkdir()
    if state is None:
        student.save_pretrained(part)  # type: ignore[operator]
    else:
        student.save_pretrained(part, state_dict=state)  # type: ignore[operator]
    if adapters:
        settings = run.stages[-1].lora
        assert settings is not None
        lora.save(part / lora.FOLDER, dict(adapters), settings, run.out)
    for file in (run.data / "tokenizer").iterdir():
        shutil.copy(file, part / file.name)
    (part / "run.json").write_text(json.dumps(done, indent=2) + "\n")
    card.write(part, run, done)
    if run.out.exists():
        os.rename(run.out, _beside(run.out, "old"))
    os.rename(part, run.out)
    _sweep(run.out)


def _state(student: nn.Module, first: bool) -> dict[str, torch.Tensor] | None:
    """Whole weights for `first`, where they are shared out over workers: one after the other, so
    that no GPU ever holds them all. Tied ones are there once."""
    names = {name for name, _ in student.named_parameters()}
    if not any(hasattr(parameter, "ds_id") for parameter in student.parameters()):
        return None
    state = {}
    for name, tensor in engine.values(student, names):
        if first:
            state[name] = tensor.to("cpu", copy=True)
    if first:
        state |= {name: x for name, x in student.state_dict().items() if name not in names
                  and name in dict(student.named_buffers())}  # fmt: skip
    return state


def _beside(out: Path, kind: str) -> Path:
    """A name that nobody else has chosen."""
    return out.with_name(f".{out.name}.{uuid.uuid4().hex}.{kind}")


def _sweep(out: Path) -> None:
    """Delete what this and interrupted exports have left."""
    for kind in ("part", "old"):
        for folder in out.parent.glob(f".{glob.escape(out.name)}.{'[0-9a-f]' * 32}.{kind}"):
            shutil.rmtree(folder, ignore_errors=True)
