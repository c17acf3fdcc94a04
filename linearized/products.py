"""Ways to multiply rows by a weight on the CPU, and which of them is fastest here.

Eager torch multiplies a weight as it lies. oneDNN multiplies it in blocks that fit the processor,
if it may lay it out once. Neither is faster everywhere: that depends on the processor, the threads,
the shape and the number of rows. So it is measured, on a model's layers in the order in which
decoding runs them: a small weight alone would stay in a cache that a whole model does not fit in.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 512)
"""Numbers of rows that are measured. Any other number is treated as the nearest of them."""
BUDGET = 1.8
"""Seconds for all that is measured of a model. A large model is measured at fewer rows."""
MARGIN = 0.9
"""A layout replaces eager torch where it needs less than this share of eager's time. Inside a model
a product that is a few percent faster alone has been seen to be slower."""
WORTH = 0.97
"""A layout is worth its memory if it takes less than this share of eager's time on average."""
_EDGES = [math.sqrt(a * b) for a, b in itertools.pairwise(ROWS)]
_MANY = ROWS[:7]
"""Where reading a weight takes most of the time: measured on many weights, the others on few."""
_RING = 128 << 20
"""Bytes of weights that are read in turn: more than most processors' caches hold."""
_TURNS = 6
_LEAST = 3
"""Times by which anything is chosen."""

Shape = tuple[int, int]
Run = Callable[[Tensor], Tensor]
Times = dict[tuple[Shape, int, str], list[float]]


@dataclass(frozen=True)
class Routine:
    """A layout and what multiplies rows [..., C] by a weight [W, C] that is laid out so."""

    lay: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    dtype: torch.dtype = torch.float32


def _blocks(weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    """For some tens of rows, which is good for few and for hundreds, too."""
    laid: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), 64)
    return laid


def _onednn(x: Tensor, laid: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = _linear(x, laid, bias, "none", [], "")
    return out


def _bfloat16(x: Tensor, laid: Tensor, bias: Tensor | None) -> Tensor:
    out = _onednn(x.bfloat16(), laid, None).float()
    return out if bias is None else out.add_(bias)


_linear: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
"""None in builds without oneDNN; looked up once."""

EAGER = "eager"
ROUTINES = {
    "onednn": Routine(functools.partial(_blocks, dtype=torch.float32), _onednn),
    "bfloat16": Routine(
        functools.partial(_blocks, dtype=torch.bfloat16), _bfloat16, torch.bfloat16
    ),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What multiplies weights of one shape: the name of a routine for each of `ROWS`, or EAGER."""

    names: tuple[str, ...] = (EAGER,) * len(ROWS)

    @classmethod
    def always(cls, name: str) -> Choice:
        return cls((name,) * len(ROWS))

    def at(self, rows: int) -> str:
        return self.names[bisect.bisect(_EDGES, rows)] if rows else EAGER

    @property
    def layouts(self) -> list[str]:
        """Those that some number of rows uses."""
        return sorted(set(self.names) - {EAGER})


def available() -> bool:
    """Does this build of torch have oneDNN?"""
    return _linear is not None and torch._C._has_mkldnn


class Laid:
    """A weight laid out for a routine, and what it looked like then.

    A write in place is seen by torch's version counter, another storage by its address. A write
    through `.data` or numpy changes neither, so a sample is compared, too: elements spread over
    every row, and over every column if there are at least as many rows. That costs a few
    microseconds. A write to single elements only can still be missed.
    """

    def __init__(self, weight: Tensor, name: str) -> None:
        self._routine = ROUTINES[name]
        self._laid = self._routine.lay(weight)
        self._sample = _sample(weight)  # holds the storage: nothing else gets its address
        self._kept = self._sample.clone()
        self._stamp = _stamp(weight)
        self.nbytes = weight.numel() * self._routine.dtype.itemsize

    def is_of(self, weight: Tensor) -> bool:
        return _stamp(weight) == self._stamp and torch.equal(self._sample, self._kept)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._routine.multiply(x, self._laid, bias)


def _stamp(weight: Tensor) -> tuple[object, ...]:
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.shape, weight.stride()


def _sample(weight: Tensor) -> Tensor:
    """One element less than a row apart, so that no row is left out. As integers, since NaN is not
    equal to itself."""
    step = max(1, weight.shape[1] - 1)
    return weight.detach().view(-1).view(torch.int32)[::step]


def fastest(
    layers: Sequence[nn.Linear], dtype: torch.dtype, pack: Callable[[nn.Linear, str], Run]
) -> dict[Shape, Choice]:
    """The choice for every shape of weight [W, C] in a model's layers, in the order of their use.

    Measured with the threads that torch has now and kept in this process, so that the same shape is
    always multiplied in the same way. With `dtype` bfloat16, a shape goes that way for any number
    of rows or for none: a text must not depend on how many tokens a step reads. `pack` gives the
    forward of a layer that uses a routine, with all that it does besides multiplying.
    """
    threads = torch.get_num_threads()
    shapes = [_shape(layer) for layer in layers]
    if not set(shapes) <= set(_known.get((threads, dtype), {})):
        kinds = {torch.float32, dtype}
        names = [name for name, one in ROUTINES.items() if one.dtype in kinds]
        times = _measure(layers, names, pack)
        for kind in kinds:
            known = _known.setdefault((threads, kind), {})
            for shape in set(shapes) - set(known):
                known[shape] = choose(_of(times, shape, {torch.float32, kind}))
    return {shape: _known[threads, dtype][shape] for shape in shapes}


def _of(times: Times, shape: Shape, kinds: set[torch.dtype]) -> dict[tuple[int, str], list[float]]:
    return {
        (rows, name): found
        for (one, rows, name), found in times.items()
        if one == shape and (name == EAGER or ROUTINES[name].dtype in kinds)
    }


_known: dict[tuple[int, torch.dtype], dict[Shape, Choice]] = {}


def choose(times: dict[tuple[int, str], list[float]]) -> Choice:
    """From seconds by rows and name, to the choice. One layout at most, since each is a copy of the
    weight. Rows that were measured less than thrice are left to eager torch."""
    shares = {
        (rows, name): _share(found, times[rows, EAGER])
        for (rows, name), found in times.items()
        if min(len(found), len(times.get((rows, EAGER), []))) >= _LEAST
    }
    best, least = Choice(), WORTH
    for name in sorted({name for _, name in shares} - {EAGER}):
        exact = ROUTINES[name].dtype == torch.float32
        names = [
            name if not exact or shares.get((rows, name), 1.0) < MARGIN else EAGER for rows in ROWS
        ]
        share = statistics.geometric_mean(
            [shares.get((rows, one), 1.0) for rows, one in zip(ROWS, names, strict=True)]
        )
        if share < least:
            best, least = Choice(tuple(names)), share
    return best


def _share(found: list[float], eager: list[float]) -> float:
    """Of eager's time. The quick ones are compared, since other work on the machine only ever adds;
    the very quickest alone would be luck."""
    pairs = zip(sorted(found), sorted(eager), strict=False)
    return max(a / b for a, b in itertools.islice(pairs, 1 + len(eager) // 4))


@torch.no_grad()
def _measure(
    layers: Sequence[nn.Linear], names: Iterable[str], pack: Callable[[nn.Linear, str], Run]
) -> Times:
    """Contestants take turns, so that whatever else the machine does meets them all. In its turn
    each multiplies all numbers of rows: alone it finds in the caches what they hold of its weights,
    as it does when a model decodes."""
    end = time.perf_counter() + BUDGET
    ring, few = _ring(layers, _RING), _ring(layers, 0)
    runs: dict[str, dict[nn.Linear, Run]] = {
        EAGER: {layer: functools.partial(type(layer).forward, layer) for layer in ring}
    }
    for name in names:
        runs[name] = {layer: pack(layer, name) for layer in ring}
    generator = torch.Generator().manual_seed(0)
    widths = {layer.weight.shape[1] for layer in ring}
    inputs = {
        (rows, width): torch.randn(rows, width, generator=generator)
        for rows, width in itertools.product(ROWS, widths)
    }
    times: Times = {}
    for _, name in itertools.product(range(_TURNS), runs):
        for rows in (*reversed(_MANY), *ROWS[len(_MANY) :]):
            for layer in ring if rows in _MANY else few:
                x = inputs[rows, layer.weight.shape[1]]
                _others(x)
                begin = time.perf_counter()
                runs[name][layer](x)
                now = time.perf_counter()
                times.setdefault((_shape(layer), rows, name), []).append(now - begin)
                if now > end:
                    return times
    return times


def _others(x: Tensor) -> None:
    """Some of what a model does between two products. It drives a product's code out of the nearest
    caches, which costs the routine with more code more."""
    x = torch.cat([x * x.pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt(), x], dim=-1)
    x.chunk(2, dim=-1)[0].sigmoid().transpose(0, 1).contiguous().sum()


def _ring(layers: Sequence[nn.Linear], size: int) -> list[nn.Linear]:
    """The first of them, up to `size` bytes, and one of every shape at least."""
    found: list[nn.Linear] = []
    seen: set[Shape] = set()
    for layer in layers:
        if size > 0 or _shape(layer) not in seen:
            found.append(layer)
            seen.add(_shape(layer))
            size -= layer.weight.nbytes
    return found


def _shape(layer: nn.Linear) -> Shape:
    return layer.weight.shape[0], layer.weight.shape[1]
