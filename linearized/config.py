"""What a linearized model is, as data. Knows names and sizes; knows nothing of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
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
"""The names of the attention variants. `linearized.attention` has their classes, `docs/variants.md`
their formulas."""

EXACT = ("grouped", "hedgehog", "local")
"""Those that attend near tokens exactly."""

NAMED: dict[str, dict[str, Any]] = {
    "anchored": {"attention": "hedgehog", "window": 3, "sinks": 4, "bound": 256.0},
}
"""Combinations that have proven themselves. `anchored` is the one for pretrained models: exact
softmax of what is near and of the first tokens, and a far part whose mass is bounded."""

LATER = ("window", "sinks", "bound")
"""Settings that the first version did not have."""

FLASH = "flash"
"""The attention of `FlashForCausalLM`, a model that is linear from scratch. No other model can use
it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """Says how a model's attention is replaced. It is kept inside the model's own config and saved
    with it."""

    attention: str
    """The variant's name. `grouped` is exact inside the open group and keeps a linear state of
    earlier groups; `docs/variants.md` describes all variants."""
    augment: bool = True
    """Whether to add the masked depthwise convolution over the values."""
    group: int = 64
    """Number of tokens that are attended exactly before they are folded into the state. Used by
    `local`, `global`, `grouped` and `hedgehog`."""
    window: int = 0
    """Number of groups before a token's own that are attended exactly, too. Used by `local`,
    `grouped` and `hedgehog` in causal models. 0 is their published definition."""
    sinks: int = 0
    """Number of a document's first tokens that are attended exactly for good; at most `group`. Used
    as `window` is."""
    bound: float | None = None
    """Number of far tokens from which on their weights shrink as 1 / (number of far tokens), so
    that the mass of the far part no longer grows with the text. It is learnt per head from here.
    Used by `hedgehog` in causal models. None is the published definition: no bound."""
    taps: int = 32
    """Length of the convolution. Tap i weighs the value i tokens back; where the model reads in
    both directions, also the value i tokens ahead."""
    layers: tuple[int, ...] | None = None
    """Numbers of the layers to linearize, from 0. The other layers keep softmax and a cache that
    grows. None means all layers. An empty list keeps softmax everywhere and only changes how the
    model decodes."""
    features: int = 128
    """Number of random features of `performer` and `rfa`, and of rows of `linformer`."""
    hashes: int = 16
    """Number of hash tables of `yoso`."""
    bits: int = 5
    """Number of bits of a hash of `yoso`. A table has 2^bits buckets."""
    period: int = 512
    """Number of positions after which the learned projection of `linformer` repeats."""
    seed: int = 0
    """Seed of the random features and hashes, which are saved with the model."""

    def __post_init__(self) -> None:
        if self.attention not in (*ATTENTIONS, FLASH):
            choices = ", ".join(sorted(ATTENTIONS))
            raise ConfigError(f"unknown attention {self.attention!r}; choose from {choices}")
        for name in ("group", "taps", "features", "hashes", "bits", "period"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
            object.__setattr__(self, name, int(value))
        self._check_near()
        if self.bits > 16:
            raise ConfigError(f"bits must be at most 16, tables of 65,536 buckets, got {self.bits}")
        if not is_whole(self.seed) or not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed must be an integer from 0 to 2^63 - 1, got {self.seed!r}")
        object.__setattr__(self, "seed", int(self.seed))
        if self.layers is not None:
            object.__setattr__(self, "layers", _layers(self.layers))

    def _check_near(self) -> None:
        for name in ("window", "sinks"):
            value = getattr(self, name)
            if not is_whole(value) or value < 0:
                raise ConfigError(f"{name} must be an integer of at least 0, got {value!r}")
            object.__setattr__(self, name, int(value))
            if value and self.attention not in EXACT:
                raise ConfigError(
                    f"{name} must be 0 with {self.attention!r}, which attends nothing exactly, got "
                    f"{value}; choose from {', '.join(EXACT)}"
                )
        if self.sinks > self.group:
            raise ConfigError(f"sinks must be at most group = {self.group}, got {self.sinks}")
        if self.bound is None:
            return
        if self.attention != "hedgehog":
            raise ConfigError(f"bound is hedgehog's; leave it out with {self.attention!r}")
        if not isinstance(self.bound, Real) or isinstance(self.bound, bool):
            raise ConfigError(f"bound must be a number above 0, got {self.bound!r}")
        if not 0 < self.bound < float("inf"):
            raise ConfigError(f"bound must be a number above 0, got {self.bound!r}")
        object.__setattr__(self, "bound", float(self.bound))

    @classmethod
    def named(cls, name: str, **settings: Any) -> LinearConfig:
        """An attention by its name, or a combination from `NAMED`, such as `anchored`. `settings`
        go before its own.

        Raises:
            ConfigError: there is no such name or setting.
        """
        if name not in (*NAMED, *ATTENTIONS):
            choices = ", ".join(sorted((*NAMED, *ATTENTIONS)))
            raise ConfigError(f"unknown attention {name!r}; choose from {choices}")
        return cls.from_dict({**NAMED.get(name, {"attention": name}), **settings})

    def to_dict(self) -> dict[str, Any]:
        """As a model's config holds it: without `LATER` settings that have their defaults. So a
        model of an earlier version keeps its fingerprint, and what needs none of them can be read
        by one."""
        values = asdict(self)
        for field in fields(self):
            if field.name in LATER and values[field.name] == field.default:
                del values[field.name]
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
    """Whether the value is an integer of Python or numpy. A bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _layers(given: Any) -> tuple[int, ...]:
    if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
        raise ConfigError(f"layers must be a list of layer numbers from 0, got {given!r}")
    layers = tuple(given)
    if not all(is_whole(layer) and layer >= 0 for layer in layers):
        raise ConfigError(f"layers must be a list of layer numbers from 0, got {list(layers)}")
    return tuple(sorted({int(layer) for layer in layers}))
