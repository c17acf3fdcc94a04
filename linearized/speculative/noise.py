"""Gumbel noise as a pure function of (seed, choice, position, token). No generator, no state.

Integer hashing only until the last step, so that CPU and GPU draw the same numbers. The mixer is
splitmix64's finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014), in 64-bit integers that wrap.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 64
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def gumbel(seed: int, positions: Tensor, num_tokens: int, *, choice: int = 0) -> Tensor:
    """Noise [N, V] in float64 for tokens at `positions` [N] of a sequence.

    argmax(log p + noise) has distribution p, and is the same token wherever it is computed.
    """
    device = positions.device
    key = _mix(torch.tensor(_signed(seed), device=device))
    key = _mix(key ^ _signed((choice + 1) * _GOLDEN))
    keys = _mix(key + positions.long() * _signed(_GOLDEN))  # N
    tokens = torch.arange(1, num_tokens + 1, device=device) * _signed(_GOLDEN)  # V
    bits = _mix(_mix(keys[:, None] + tokens))  # N V
    uniform = (_shift(bits, 11).double() + 0.5) * 2.0**-53  # in (0, 1), 53 bits
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift(x, 27)) * _signed(_SECOND)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (_BITS - bits)) - 1)


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer."""
    value &= (1 << _BITS) - 1
    return value - (1 << _BITS) if value >> (_BITS - 1) else value
