"""Whether two models are the same. Knows weights and config; knows nothing of states."""

from __future__ import annotations

import hashlib
import json
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

TRANSIENT = ("_name_or_path", "transformers_version", "dtype", "architectures")
"""Entries of a config that say nothing about what the model computes."""
SAMPLES = 16
"""Numbers of a weight that are looked at, evenly spread over it."""
_KEY = "_linearized_fingerprint"


def fingerprint(model: PreTrainedModel, *, fresh: bool = False) -> str:
    """A short hash of the config and of a sample of every weight: equal for equal models, on any
    machine. It is kept with the model and worked out anew when a weight was replaced, written or
    moved. Only writes through `.data` leave no trace; with `fresh` the weights are looked at in
    any case, and they are noticed, too. `new_state` does so."""
    known: _Fingerprint | None = model.__dict__.get(_KEY)
    if fresh or known is None or not known.holds():
        known = _Fingerprint.of(model)
        model.__dict__[_KEY] = known
    return known.value


def forget(model: nn.Module) -> None:
    """Let go of what was worked out of a model and kept with it: its layers have changed."""
    for name in [name for name in model.__dict__ if name.startswith("_linearized_")]:
        del model.__dict__[name]


@dataclass(frozen=True, slots=True)
class _Fingerprint:
    """One that was worked out, and how to tell that it still holds without looking at numbers."""

    value: str
    weights: list[_Weight]
    children: list[tuple[dict[str, Any], list[Any], dict[str, Any], int]]
    """Of each module: its children, and how many parameters it has of its own."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Fingerprint:
        config = model.config.to_dict()
        for transient in TRANSIENT:
            config.pop(transient, None)
        digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode())
        named = dict(model.named_parameters())
        for (name, parameter), sample in zip(
            named.items(), _samples(list(named.values())), strict=True
        ):
            digest.update(name.encode() + str(tuple(parameter.shape)).encode() + sample)
        weights = [
            _Weight.of(module._parameters, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        children: list[tuple[dict[str, Any], list[Any], dict[str, Any], int]] = [
            (m._modules, list(map(id, m._modules.values())), m._parameters, len(m._parameters))
            for m in model.modules()
        ]
        return cls(digest.hexdigest()[:16], weights, children)

    def holds(self) -> bool:
        for modules, known, parameters, count in self.children:
            if len(parameters) != count or list(map(id, modules.values())) != known:
                return False
        return all(weight.is_same() for weight in self.weights)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model, or a pickled one, works out its own."""
        return _nothing, ()


@dataclass(frozen=True, slots=True)
class _Weight:
    """Where a weight is kept, and what changes when it is replaced, written or moved. The weight
    itself is not kept alive."""

    holder: dict[str, nn.Parameter | None]
    name: str
    tensor: weakref.ref[Tensor]
    version: int
    address: int

    @classmethod
    def of(cls, holder: Any, name: str, weight: Tensor) -> _Weight:
        return cls(holder, name, weakref.ref(weight), _version(weight), weight.data_ptr())

    def is_same(self) -> bool:
        weight = self.holder.get(self.name)
        return (
            weight is not None
            and weight is self.tensor()
            and _version(weight) == self.version
            and weight.data_ptr() == self.address
        )


def _nothing() -> None:
    return None


def _version(weight: Tensor) -> int:
    """Grows with every write; an inference tensor has none."""
    return 0 if weight.is_inference() else weight._version


def _samples(weights: list[nn.Parameter]) -> list[bytes]:
    """A few numbers of each, as float64; one transfer from each device."""
    picked = [weight.detach().flatten()[_spread(weight.numel())].double() for weight in weights]
    by_device: dict[torch.device, list[int]] = {}
    for index, sample in enumerate(picked):
        by_device.setdefault(sample.device, []).append(index)
    found = [b""] * len(picked)
    for indices in by_device.values():
        line = torch.cat([picked[index] for index in indices]).cpu()
        parts = line.split([len(picked[index]) for index in indices])
        for index, part in zip(indices, parts, strict=True):
            found[index] = part.numpy().tobytes()
    return found


def _spread(size: int) -> slice:
    return slice(None, None, max(size // SAMPLES, 1))
