"""What a linearized model is, as data. Knows names and sizes; knows nothing of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from linearized.errors import ConfigError

ATTENTIONS = ("grouped", "local")
"""Attention variants by name; `linearized.attention` has one class for each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """How attention is replaced. Kept inside the model's own config and saved with it."""

    attention: str
    """`grouped`: exact inside the open group, a linear state for earlier ones. `local`: the group
    alone."""
    augment: bool = True
    """Add the masked depthwise convolution over values."""
    group: int = 64
    """Tokens attended exactly before they are folded into the state."""
    taps: int = 32
    """Length of the convolution; tap i weighs the value i tokens back."""

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            choices = ", ".join(sorted(ATTENTIONS))
            raise ConfigError(f"unknown attention {self.attention!r}; choose from {choices}")
        for name in ("group", "taps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LinearConfig:
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown setting {', '.join(unknown)} in the model's `linearized` config; "
                f"known are {', '.join(sorted(known))} (was it saved by a newer version?)"
            )
        if "attention" not in values:
            raise ConfigError("the model's `linearized` config names no `attention`")
        return cls(**values)
