"""Weights laid out for the CPU's matrix products. Knows `nn.Linear`; knows nothing of attention.

Eager torch multiplies weights as they lie. oneDNN multiplies them in blocks that fit the processor,
if it may lay them out so once; `python -m jobs.bench_models` shows how much faster that is. It is
for decoding and evaluation, in float32; what needs a gradient, or another type, goes the ordinary
way.
"""

from __future__ import annotations

import itertools
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearized.errors import ConfigError
from linearized.head import OutputLinear

ROWS = 64
"""What the layout is chosen for. It is good for few rows, too, and for hundreds."""
LEAST = 4
"""Fewer rows are filled up with zeros: oneDNN reads weights more slowly for one or two of them."""


def can_pack(model: nn.Module) -> bool:
    """Is there anything that `pack` would lay out, and can this build of torch?"""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and any(_fits(linear.weight) for linear in _linears(model))


def pack(model: nn.Module) -> int:
    """Lay out the weights of every linear layer on the CPU in float32 a second time. Returns the
    bytes that this takes. The model's parameters stay what they are; whoever writes them afterwards
    is noticed, and they are laid out anew.

    Raises:
        ConfigError: this build of torch cannot.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise ConfigError("this build of torch has no oneDNN, which packing needs")
    size = 0
    for linear in _linears(model):
        if _fits(linear.weight):
            linear.forward = _Packed(linear)  # type: ignore[method-assign,assignment]
            size += linear.weight.nbytes
    return size


def is_packed(model: nn.Module) -> bool:
    return any("forward" in linear.__dict__ for linear in _linears(model))


def unpack(model: nn.Module) -> None:
    """Let go of what `pack` has laid out."""
    for linear in _linears(model):
        linear.__dict__.pop("forward", None)


def _linears(model: nn.Module) -> list[nn.Linear]:
    kinds = (nn.Linear, OutputLinear)
    modules = (module for module in model.modules() if type(module) in kinds)
    return cast(list[nn.Linear], list(modules))


def _fits(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


class _Packed:
    """The forward of a linear layer. Lays its weight out when it is called."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.handle = next(_handles)
        self._packed: Tensor | None = None
        self._stamp: tuple[int, int] | None = None
        _by_handle[self.handle] = self

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if learns or not _fits(x) or not _fits(weight):
            return F.linear(x, weight, bias)
        out: Tensor = torch.ops.linearized.packed_linear(x, self.handle, len(weight))
        return out

    def multiply(self, x: Tensor) -> Tensor:
        parameters = self.linear._parameters  # a fifth of the way by linear.weight
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        stamp = (0 if weight.is_inference() else weight._version, weight.data_ptr())
        if self._packed is None or self._stamp != stamp:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
            self._stamp = stamp
        rows = x.numel() // x.shape[-1]
        if rows >= LEAST:
            out: Tensor = _multiply(x, self._packed, bias, "none", [], "")
            return out
        out = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, LEAST - rows))
        out = _multiply(out, self._packed, bias, "none", [], "")
        return out[:rows].view(*x.shape[:-1], len(weight))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles lay out their own."""
        return _Packed, (self.linear,)


_multiply: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
"""None in builds without oneDNN; looked up once."""
_handles = itertools.count()
_by_handle: WeakValueDictionary[int, _Packed] = WeakValueDictionary()

# An operator of its own, so that torch.compile need not look at oneDNN's opaque tensors. It takes
# no weight and so no gradient.
_library = torch.library.Library("linearized", "FRAGMENT")
_library.define("packed_linear(Tensor x, int handle, int width) -> Tensor")
_library.impl("packed_linear", lambda x, handle, width: _by_handle[handle].multiply(x), "CPU")


@torch.library.register_fake("linearized::packed_linear", lib=_library)
def _shape(x: Tensor, handle: int, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)
