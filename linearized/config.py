"""What a linearized model is, as data. Knows names and sizes; knows nothing of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import Any

from linearized.errors import ConfigError

ATTENTIONS = (
    "global",
    "grouped",
    "hedgehog",
    "linformer",
    "local",
    "performer",
    "relu",
    "rfa",
    "transnormer",
    "yoso",
)
"""Attention variants by name; `linearized.attention` has the classes, and a page on them all."""

FLASH = "flash"
"""The attention of `FlashForCausalLM`, which is made linear; no other model can take it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """How attention is replaced. Kept inside the model's own config and saved with it."""

    attention: str
    """`grouped`: exact inside the open group, a linear state for earlier ones. For the others see
    `docs/variants.md`."""
    augment: bool = True
    """Add the masked depthwise convolution over values."""
    group: int = 64
    """Tokens attended exactly before they are folded into the state (`local`, `global`, `grouped`,
    `hedgehog`)."""
    taps: int = 32
    """Length of the convolution; tap i weighs the value i tokens back (and ahead, where the model
    reads in both directions)."""
    layers: tuple[int, ...] | None = None
    """Layers to linearize, counted from 0; the others keep softmax, and a state that grows. None:
    all. Empty: softmax throughout, with this library's way to decode."""
    features: int = 128
    """Random features of `performer` and `rfa`; rows of `linformer`."""
    hashes: int = 16
    """Hash tables of `yoso`."""
    bits: int = 5
    """Bits of a hash of `yoso`: tables of 2^bits buckets."""
    period: int = 512
    """Positions after which the learned projection of `linformer` repeats."""
    seed: int = 0
    """Random features and hashes are drawn from it, and saved with the model."""

    def __post_init__(self) -> None:
        if self.attention not in (*ATTENTIONS, FLASH):
            choices = ", ".join(sorted(ATTENTIONS))
            raise ConfigError(f"unknown attention {self.attention!r}; choose from {choices}")
        for name in ("group", "taps", "features", "hashes", "bits", "period"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
            object.__setattr__(self, name, int(value))
        if self.bits > 16:
            raise ConfigError(f"bits must be at most 16, tables of 65,536 buckets, got {self.bits}")
        if not is_whole(self.seed) or not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed must be an integer from 0 to 2^63 - 1, got {self.seed!r}")
        object.__setattr__(self, "seed", int(self.seed))
        if self.layers is not None:
            object.__setattr__(self, "layers", _layers(self.layers))

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        if self.layers is not None:
            values["layers"] = list(self.layers)
        return values

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


def is_whole(value: object) -> bool:
    """An integer, numpy's too; not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _layers(given: Any) -> tuple[int, ...]:
    if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
        raise ConfigError(f"layers must be a list of layer numbers from 0, got {given!r}")
    layers = tuple(given)
    if not all(is_whole(layer) and layer >= 0 for layer in layers):
        raise ConfigError(f"layers must be a list of layer numbers from 0, got {list(layers)}")
    return tuple(sorted({int(layer) for layer in layers}))
