"""Rotary positions whose angles depend on the longest text of a pass: they are fixed, so that a
text's neighbours and drafts do not change it. Knows transformers' rotary modules and their config.

With `dynamic` (NTK) every text is read as one within the length that the model was trained for.
With `longrope` every text is read as a long one if the model's `max_position_embeddings` exceeds
the length it was trained for, and as a short one otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from linearized.errors import ModelError

_DYNAMIC = {
    "rope_type", "type", "rope_theta", "factor", "partial_rotary_factor",
    "original_max_position_embeddings",
}  # fmt: skip
"""What `dynamic` is known to be made of; some families add to it."""


def fix_rope(model: nn.Module) -> Callable[[], None]:
    """Write angles that depend on positions alone into the configs of rotary modules, and build
    these anew. Returns what undoes the latter.

    Raises:
        ModelError: it is not known how.
    """
    found = [
        (parent, name, module)
        for parent in model.modules()
        for name, module in parent.named_children()
        if hasattr(module, "rope_type") and hasattr(module, "config")
    ]
    moving = [place for place in found if any(map(_moves, _rope_types(place[2])))]

    def undo() -> None:
        for parent, name, module in moving:
            setattr(parent, name, module)

    for parent, name, module in moving:
        for settings in _settings(module.config):
            _fix(settings, module.config)
        setattr(parent, name, _rebuilt(module))
    return undo


def _rope_types(module: Any) -> list[str]:
    kinds = module.rope_type
    return list(kinds.values()) if isinstance(kinds, dict) else [kinds]


def _moves(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _settings(config: Any) -> Iterator[dict[str, Any]]:
    """Those of all layers, or of each kind of layer."""
    settings = config.rope_parameters
    if "rope_type" in settings:
        yield settings
    else:
        yield from (each for each in settings.values() if isinstance(each, dict))


def _fix(settings: dict[str, Any], config: Any) -> None:
    kind = settings.get("rope_type", "default")
    if kind == "longrope":
        limit = config.max_position_embeddings
        long = limit > settings.get("original_max_position_embeddings", limit)
        settings["short_factor"] = settings["long_factor"] = (
            settings["long_factor"] if long else settings["short_factor"]
        )
    elif "dynamic" in kind:
        unknown = sorted(set(settings) - _DYNAMIC)
        if unknown:
            raise ModelError(
                f"rotary positions of type {kind!r} with {', '.join(unknown)} depend on the "
                "longest text of a pass, and it is not known how to fix them; set another "
                "rope_type in the model's config"
            )
        settings["rope_type"] = "default"
        settings.pop("factor", None)


def _rebuilt(module: nn.Module) -> nn.Module:
    buffer = next(module.buffers())
    made: Any = type(module)
    with torch.device(buffer.device):
        fixed: nn.Module = made(config=module.config)
    return fixed.to(buffer.dtype).train(module.training)
