"""Gumbel noise as a pure function of (seed, choice, position, token). No generator, no state.

Integer hashing only until the last step, so that CPU and GPU draw the same numbers. The mixer is
splitmix64's finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014), in 64-bit integers that wrap.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

Device = torch.device | str

_BITS = 64
_WORDS = 1 << _BITS
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


Key = tuple[int, int, int]
"""Seed, choice, position."""


def gumbel(
    seed: int, positions: Sequence[int], num_tokens: int, *, choice: int = 0, device: Device = "cpu"
) -> Tensor:
    """Noise [N, V] in float64 for tokens at `positions` [N] of a sequence.

    argmax(log p + noise) has distribution p, and is the same token wherever it is computed.
    """
    keys = [(seed, choice, position) for position in positions]
    return gumbel_of(keys, num_tokens, device=device)


def gumbel_of(keys: Sequence[Key], num_tokens: int, *, device: Device = "cpu") -> Tensor:
    """The same, [N, V], for places of several texts at once."""
    bases = {(seed, choice): _base(seed, choice) for seed, choice, _ in keys}
    words = [
        _signed(_mix((bases[seed, choice] + position * _GOLDEN) % _WORDS))
        for seed, choice, position in keys
    ]
    rows = torch.tensor(words, device=device)[:, None] + _tokens(num_tokens, torch.device(device))
    bits = _mix_all(_mix_all(rows))  # N V
    uniform = (_shift(bits, 11).double() + 0.5) * 2.0**-53  # in (0, 1), 53 bits
    return uniform.log_().neg_().log_().neg_()


def _base(seed: int, choice: int) -> int:
    return _mix(_mix(seed % _WORDS) ^ ((choice + 1) * _GOLDEN % _WORDS))


@functools.lru_cache(maxsize=8)
def _tokens(num_tokens: int, device: torch.device) -> Tensor:
    return torch.arange(1, num_tokens + 1, device=device) * _signed(_GOLDEN)


def _mix(x: int) -> int:
    x = (x ^ (x >> 30)) * _FIRST % _WORDS
    x = (x ^ (x >> 27)) * _SECOND % _WORDS
    return x ^ (x >> 31)


def _mix_all(x: Tensor) -> Tensor:
    """The same, of every number."""
    x = (x ^ _shift(x, 30)).mul_(_signed(_FIRST))
    x = (x ^ _shift(x, 27)).mul_(_signed(_SECOND))
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> bits).bitwise_and_((1 << (_BITS - bits)) - 1)


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer."""
    value %= _WORDS
    return value - (1 << _BITS) if value >> (_BITS - 1) else value
