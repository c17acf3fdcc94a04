"""Who computes: a backend by its name. Knows what every backend offers, and computes nothing.

B batch, H query heads, K key/value heads, T tokens, N tree nodes, X width of queries and keys, U of
values, M taps, L layers.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

from torch import Tensor

from linearized.errors import ConfigError
from linearized.ops import cpu, reference
from linearized.ops.form import Form
from linearized.ops.layout import Layout
from linearized.state import GroupState

BACKENDS = ("cpu", "reference", "triton")
"""`cpu` are chunks, on every device; `triton` needs a GPU (or TRITON_INTERPRET=1)."""


class Backend(Protocol):
    """Three functions, the same ones of every backend. They trust their arguments, which
    `operator.py` has checked, and raise ConfigError for a form or a device that is not theirs."""

    def attend_sequence(
        self,
        q: Tensor,  # [B, H, T, X]
        k: Tensor,  # [B, K, T, X]
        v: Tensor,  # [B, K, T, U]
        state: GroupState | None = None,
        *,
        form: Form,
        alpha: Tensor | None,  # [H]; None: 1
        taps: Tensor | None,  # [H, M], column i of lag i; not causal: [H, 2M-1], of lag i - (M-1)
        unit_norm: bool = False,
        mask: Tensor | None = None,  # [B, T], False: no token here
        segments: Tensor | None = None,  # [B, T], a new document begins where the number changes
    ) -> Tensor:
        """Outputs [B, H, T, U] of T tokens that follow the state's in time. Writes nothing. Where
        `mask` is False the output is zero. `unit_norm` divides queries and keys by their norms
        first. Segments come without a state."""
        ...

    def attend_tree(
        self,
        q: Tensor,  # [B, H, N, X]
        k: Tensor,  # [B, K, N, X]
        v: Tensor,  # [B, K, N, U]
        layout: Layout,
        state: GroupState,
        *,
        form: Form,
        alpha: Tensor | None,
        taps: Tensor | None,
    ) -> Tensor:
        """Outputs [B, H, N, U] of N tree nodes, each what sequential decoding along its path would
        give, across group boundaries too. Writes nothing."""
        ...

    def fold_(self, state: GroupState, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        """Take T more tokens, those that `mask` [B, T] keeps, into the state, in place: of one
        layer, k [B, K, T, X] and v [B, K, T, U], or of all layers stacked, [L, B, …]."""
        ...


def choose(backend: str | None) -> Backend:
    """The backend of this name; None: `cpu`, until the kernels have proven themselves on GPUs.

    Raises:
        ConfigError: there is no such backend, or not here.
    """
    if backend is None or backend == "cpu":
        return cpu
    if backend == "reference":
        return reference
    if backend == "triton":
        return _triton()
    choices = ", ".join(BACKENDS)
    raise ConfigError(f"unknown backend {backend!r}; choose from {choices}")


def _triton() -> Backend:
    try:
        kernels: Any = importlib.import_module("linearized.ops.kernels")
    except ImportError as error:
        raise ConfigError(
            f"backend 'triton' is not available here ({error}); install triton, or choose 'cpu', "
            "which runs on GPUs, too"
        ) from error
    return cast(Backend, kernels)
