"""Weights laid out once more for the CPU's matrix products, where that is faster.

Knows `nn.Linear`; knows nothing of attention. `products.py` measures which layout is faster than
eager torch on this machine, if any. Packing is for decoding and evaluation, in float32; what needs
a gradient, or another type, goes the ordinary way.
"""

from __future__ import annotations

import itertools
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from linearized.errors import ConfigError
from linearized.head import OutputLinear
from linearized.products import EAGER, Choice, Laid, available, fastest


def can_pack(model: nn.Module) -> bool:
    """Is there a layer that `pack` would look at, and does this build of torch have oneDNN?"""
    return available() and any(_fits(linear.weight) for linear in _linears(model))


def pack(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> int:
    """Make the model's linear layers as fast as this CPU lets them be. Returns the bytes that it
    takes, which may be none.

    The first call measures for up to two seconds, for each shape of weight and number of rows,
    whether a layout of oneDNN's is faster than eager torch, with the threads that torch has now.
    Layers that gain by it get a second copy of their weight; all others are left alone. What was
    found is kept in this process, so that the next model of these shapes is packed at once.

    The model's parameters stay what they are. Whoever writes them afterwards is noticed, and they
    are laid out anew; only a write to a few elements through `.data` or numpy can be missed: call
    `pack` again after such a write. A layer whose `forward` somebody else has replaced is left
    alone.

    Args:
        dtype: bfloat16 lets products be computed in bfloat16 where that is faster, as it is on
            processors with AMX. Every product then has an error of some tenths of a percent, and
            texts may be other ones. Weights, sums between the products and logits stay float32.

    Raises:
        ConfigError: this build of torch has no oneDNN, or `dtype` is neither float32 nor bfloat16.
    """
    if not available():
        raise ConfigError("this build of torch has no oneDNN, which packing needs")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    linears = [one for one in _linears(model) if _fits(one.weight) and not _is_foreign(one)]
    choices = fastest(linears, dtype, _only)
    exact = fastest(linears, torch.float32, _only)
    size = 0
    for linear in linears:
        found = exact if isinstance(linear, OutputLinear) else choices
        choice = found[linear.weight.shape[0], linear.weight.shape[1]]
        linear.__dict__.pop("forward", None)
        if choice.layouts:
            packed = linear.__dict__["forward"] = _Packed(linear, choice)
            size += packed.lay()
    return size


def is_packed(model: nn.Module) -> bool:
    """Has `pack` laid out any of its weights?"""
    return any(isinstance(one.__dict__.get("forward"), _Packed) for one in _linears(model))


def unpack(model: nn.Module) -> None:
    """Let go of what `pack` has laid out, and of nothing else."""
    for linear in _linears(model):
        if isinstance(linear.__dict__.get("forward"), _Packed):
            del linear.__dict__["forward"]


def _linears(model: nn.Module) -> list[nn.Linear]:
    kinds = (nn.Linear, OutputLinear)
    modules = (module for module in model.modules() if type(module) in kinds)
    return cast(list[nn.Linear], list(modules))


def _only(linear: nn.Linear, name: str) -> _Packed:
    return _Packed(linear, Choice.always(name))


def _is_foreign(linear: nn.Linear) -> bool:
    """A library of hooks may have put a forward of its own here; packing would take it away."""
    return not isinstance(linear.__dict__.get("forward"), (_Packed, type(None)))


def _fits(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.float32
        and weight.is_cpu
        and weight.is_contiguous()
        and weight.numel() > 0
    )


def _is_float(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_cpu and not torch.is_autocast_enabled("cpu")


def _learns(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


class _Packed:
    """The forward of a linear layer."""

    def __init__(self, linear: nn.Linear, choice: Choice) -> None:
        self.linear = linear
        self.choice = choice
        self._single = choice.at(1)
        self.handle = next(_handles)
        self._laid: dict[str, Laid] = {}
        _by_handle[self.handle] = self

    def __call__(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.multiply(x)
        weight = self.linear.weight
        if _learns(x, weight) or not (_is_float(x) and _fits(weight)):
            return self._plain(x)
        if self._single == EAGER and statically_known_true(x.numel() == x.shape[-1]):
            return self._plain(x)
        out: Tensor = torch.ops.linearized.packed_linear(x, self.handle, len(weight))
        return out

    def multiply(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        name = self.choice.at(x.numel() // x.shape[-1])
        if name == EAGER or _learns(x, weight) or not _is_float(x):
            return self._plain(x)
        laid = self._laid.get(name)
        if laid is None or not laid.is_of(weight):
            self._laid = {}
            if not (_fits(weight) and available()):
                return self._plain(x)
            laid = self._laid[name] = Laid(weight, name)
        if x.shape[-1] != weight.shape[1]:
            return self._plain(x)  # which says what is wrong
        return laid.multiply(x, self.linear.bias)

    def _plain(self, x: Tensor) -> Tensor:
        return type(self.linear).forward(self.linear, x)

    def lay(self) -> int:
        """Lay the weight out for every number of rows. Returns the bytes."""
        self._laid = {name: Laid(self.linear.weight, name) for name in self.choice.layouts}
        return sum(laid.nbytes for laid in self._laid.values())

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles lay out their own."""
        return _Packed, (self.linear, self.choice)


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
