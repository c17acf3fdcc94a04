"""How a call of the kernels is cut up. Knows shapes, tiles and devices; launches nothing."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from linearized.errors import ConfigError
from linearized.ops.form import Form
from linearized.ops.kernels import forward

PROGRAMS = 264
"""Programs that keep a large GPU busy: twice the multiprocessors of an H100."""
SHORTEST = 256
"""Slots of a segment at least: it costs a D × E memory to write and two to read."""


def check(form: Form, key_width: int, v: Tensor) -> None:
    """Raises ConfigError, naming the remedy, for what no kernel here does."""
    if form.inside not in ("relu2", "softmax", "none", "linear"):
        raise ConfigError(
            f"the Triton kernels know the weights relu2, softmax, none and linear, not "
            f"{form.inside!r}; use backend='cpu', which runs on GPUs too"
        )
    shared = form.features == key_width
    if (not form.exact and form.features and not shared) or (
        form.inside == "linear" and not shared
    ):
        raise ConfigError(
            f"the Triton kernels take, with {form.inside!r}, features as wide as the keys, "
            f"{key_width}, got {form.features}; use backend='cpu', which runs on GPUs too"
        )
    check_device(v)


def check_device(x: Tensor) -> None:
    """Raises ConfigError unless kernels run on such tensors, or are interpreted."""
    interpreted = not isinstance(forward.outputs, JITFunction)
    if x.device.type != "cuda" and not interpreted:
        raise ConfigError(
            f"the Triton kernels need a CUDA device, the tensors are on {x.device}; use "
            "backend='cpu', or set TRITON_INTERPRET=1 before Python starts to interpret them"
        )
    if interpreted and x.dtype == torch.bfloat16:
        raise ConfigError(
            "Triton's interpreter keeps bfloat16 as integers and multiplies those; use float32"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How one call is cut up. Worked out from shapes alone, so that a gradient finds the memories
    where the outputs left them."""

    group: int
    chunk: int
    blocks: int
    """In a chunk."""
    rows: int
    """Slots in a block."""
    num_slots: int
    num_chunks: int
    step: int
    """Chunks in a segment."""
    key_width: int
    """0 where no weight is a pair's."""
    value_width: int
    inside: str
    features: bool
    itemsize: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, group: int, inside: str, features: bool) -> Launch:
        num_slots, widest = q.shape[2], max(q.shape[3], v.shape[3])
        rows = 64 if v.dtype.itemsize <= 2 or widest <= 128 else 32
        chunk = group * max(rows // group, 1)
        num_chunks = -(-num_slots // chunk)
        pairs = k.shape[0] * k.shape[1]
        segments = min(-(-PROGRAMS // pairs), max(num_slots // SHORTEST, 1), num_chunks)
        return cls(
            group=group,
            chunk=chunk,
            blocks=-(-chunk // rows),
            rows=rows,
            num_slots=num_slots,
            num_chunks=num_chunks,
            step=-(-num_chunks // segments),
            key_width=q.shape[3] if features or inside != "none" else 0,
            value_width=v.shape[3],
            inside=inside,
            features=features,
            itemsize=v.dtype.itemsize,
        )

    @property
    def num_segments(self) -> int:
        return -(-self.num_chunks // self.step)

    @property
    def walk(self) -> tuple[int, int, int, int, int]:
        """The kernels' arguments that are no constants."""
        num_groups = -(-self.num_slots // self.group)
        return self.num_slots, num_groups, self.num_chunks, self.step, self.num_segments

    @property
    def blocking(self) -> dict[str, int]:
        return {
            "group": self.group,
            "chunk": self.chunk,
            "blocks": self.blocks,
            "rows": self.rows,
            "key_width": self.key_width,
            "value_width": self.value_width,
        }

    @property
    def weights(self) -> dict[str, Any]:
        """Are there pairs of different groups in a chunk, or such as weigh the same? Does a pair in
        a chunk weigh anything?"""
        across = self.features and (self.inside == "linear" or self.chunk > self.group)
        paired = across or self.inside != "none"
        return {
            "inside": self.inside,
            "features": self.features,
            "across": across,
            "paired": paired,
        }

    def convolution(self, taps: Tensor | None) -> dict[str, int]:
        num_taps = 1 if taps is None else taps.shape[1]
        return {"taps": num_taps, "window": block(num_taps - 1)}

    def grid(self, x: Tensor, width: int, tiling: dict[str, int]) -> tuple[int, int, int]:
        """Programs: rows and heads of x, segments, tiles of a width."""
        return x.shape[0] * x.shape[1], self.num_segments, -(-width // tiling["tile"])

    @property
    def key_block(self) -> int:
        return block(self.key_width)

    @property
    def value_block(self) -> int:
        return block(self.value_width)

    def tiling(self, inner: int, outer: int, loaded: int) -> dict[str, int]:
        """A tile of a memory's columns, such that the [inner, tile] that a program keeps is no more
        than 64 of a thread's 255 registers. Four warps: eight would do a product of 64 rows twice.
        As many blocks are fetched ahead, `loaded` columns wide, as leave room for a second program
        beside."""
        most = (128 if self.itemsize <= 2 else 64) * 64 // inner
        ahead = 48 * 1024 // (self.rows * loaded * self.itemsize)
        return {
            "tile": max(16, min(outer, most, 64)),
            "num_warps": 4,
            "num_stages": 1 + min(ahead, 2),
        }


def block(width: int) -> int:
    """The power of two, 16 or more, that holds a width."""
    return max(16, triton.next_power_of_2(width))


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device: make it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def numbers(dtype: torch.dtype) -> dict[str, Any]:
    """The kernels' arithmetic: sums in float32 at least, factors of float32 as three of tf32 (as
    exact, and in full they would not go to the tensor cores, nor fit the registers)."""
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    return {"wide": wide, "precision": "tf32x3", "enable_fp_fusion": True}


def strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def rowwise(x: Tensor) -> Tensor:
    """The same numbers, each row of the last dimension in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def given(x: Tensor) -> Tensor | None:
    """An operator returns tensors only: an empty one for None."""
    return x if x.numel() else None


def new(rows: Tensor, columns: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for [B, H, S, ..] of these tensors, slots before heads in memory, where models want
    their outputs."""
    batch, heads, num_slots, _ = rows.shape
    shape = batch, num_slots, heads, columns.shape[3]
    return columns.new_empty(shape, dtype=dtype or columns.dtype).transpose(1, 2)
