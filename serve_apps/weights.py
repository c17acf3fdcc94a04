"""A replica's model, as fast as its settings let it be. Knows weights; knows nothing of serving."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

import linearized
from linearized.errors import ConfigError
from linearized.packing import can_pack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("cpu", "cuda")

log = logging.getLogger(__name__)


def check(*, dtype: str, device: str) -> None:
    """
    Raises:
        ConfigError: there is no such type or device, or this machine has none.
    """
    for name, value, known in (("dtype", dtype, DTYPES), ("device", device, DEVICES)):
        if value not in known:
            raise ConfigError(f"unknown {name} {value!r}; choose from {', '.join(known)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch finds no GPU on this machine; choose cpu")


def load(
    path: str, *, pack: bool, compile: bool, dtype: str = "float32", device: str = "cpu"
) -> PreTrainedModel:
    """`pack`: lay the weights out for the CPU once more, where that is possible. `compile`: run
    steps as compiled programs; whoever gets the model warm waits for the compiler. `dtype` and
    `device` are names of DTYPES and DEVICES.

    Raises:
        ModelError: there is no such model, or its steps cannot be compiled. ConfigError: there is
            no compiler, no such type, or no such device here.
    """
    check(dtype=dtype, device=device)
    model = linearized.load(path, dtype=DTYPES[dtype])
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers wraps it
    if pack and can_pack(model):
        log.info("packing %s takes another %.0f MB", path, linearized.pack(model) / 1e6)
    if compile:
        linearized.compile(model)
    return model
