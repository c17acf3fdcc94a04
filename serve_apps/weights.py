"""A replica's model, as fast as its settings let it be. Knows weights; knows nothing of serving."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

import linearized
from linearized.packing import can_pack

log = logging.getLogger(__name__)


def load(path: str, *, pack: bool, compile: bool) -> PreTrainedModel:
    """`pack`: lay the weights out for the CPU once more, where that is possible. `compile`: run
    steps as compiled programs; whoever gets the model warm waits for the compiler.

    Raises:
        ModelError: there is no such model, or its steps cannot be compiled. ConfigError: there is
            no compiler.
    """
    model = linearized.load(path)
    if pack and can_pack(model):
        log.info("packing %s takes another %.0f MB", path, linearized.pack(model) / 1e6)
    if compile:
        linearized.compile(model)
    return model
