"""Compile every kernel for a GPU that need not be there, and print what each one takes, as JSON.

    python compiled.py DTYPE CAPABILITY SETTINGS

Launches are recorded, with tensors that have shapes and no memory, and then compiled.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from linearized.ops import kernels
from linearized.ops.form import Form
from linearized.ops.kernels import fold, launch, near, walk
from linearized.ops.layout import Layout
from linearized.state import GroupState
from linearized.tree import ancestors

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}

Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


def record(
    *,
    dtype: torch.dtype,
    width: int,
    values: int,
    group: int = 64,
    inside: str = "relu2",
    repeats: int = 1,
    past: bool = False,
    taps: int = 32,
    window: int = 0,
    sinks: int = 0,
    beside: int = 0,
) -> list[Launch]:
    """The launches of a training step, of trees with one node and with many, and of a commit."""
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((kernel, args, kwargs))

    JITFunction.run = run
    launch.check_device = fold.check_device = lambda x: None
    batch, heads, kv_heads, slots = 2, 4 * repeats, 4, 2048
    inner = group if inside != "linear" else 64

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    def rows(num: int, count: int, columns: int) -> Tensor:
        return empty(batch, count, num, columns).transpose(1, 2)

    q, k, v = rows(heads, slots, width), rows(kv_heads, slots, width), rows(kv_heads, slots, values)
    alpha, weights = empty(heads, of=torch.float32), empty(heads, taps, of=torch.float32)
    before = empty(batch, kv_heads, taps - 1, values) if past else None
    start = empty(batch, -(-slots // inner), of=torch.int64) if past else None
    features = beside or width
    form = Form(
        group=group if inside != "linear" else 1, inside=inside, features=features, window=window,
        sinks=sinks,
    )  # fmt: skip
    far, unit_norm = (q, k), True
    if window or sinks or beside:  # near pairs by kernels of their own
        of_sinks: list[Tensor | None] = [None, None]
        if sinks:
            of_sinks = [empty(batch, kv_heads, 1, sinks, x) for x in (width, values)]
        tensors, settings = (q, k, v, *of_sinks, start), (group, window, sinks, inside)
        _, *saved = near._near._init_fn(*tensors, *settings)
        near._near_backward._init_fn(rows(heads, slots, values), *tensors, *saved, *settings)
        far = rows(heads, slots, features), rows(kv_heads, slots, features)
        inside, unit_norm = "none", False
    memory = empty(batch, kv_heads, features, values, of=torch.float32) if past else None
    constants = (inner, inside, True)
    if not window or beside:  # with a window it is that of other forms
        out, *saved = walk._scan._init_fn(
            *far, v, alpha, weights, memory, before, start, *constants, unit_norm, False
        )
        walk._scan_backward._init_fn(
            out, *far, v, alpha, weights, *saved, before, start, *constants, past
        )

    width += beside
    state = GroupState.empty(
        batch, heads=kv_heads, features=features, key_width=width, value_width=values,
        tail_width=values, near=form.near, taps=taps, dtype=dtype, device="meta",
    )  # fmt: skip
    for count in (1, 64):
        parents, length = torch.full((batch, count), -1), torch.zeros(batch, dtype=torch.int64)
        layout = Layout.of(ancestors(parents), length, near=state.near, taps=taps)
        q, k, v = (
            rows(heads, count, width),
            rows(kv_heads, count, width),
            rows(kv_heads, count, values),
        )
        kernels.attend_tree(q, k, v, layout, state, form=form, alpha=alpha, taps=weights)
    mask = empty(batch, 64, of=torch.bool)
    kernels.fold_(state, k, v, mask)
    layers = GroupState(
        *(x.expand(3, *x.shape) for x in (state.memory, state.keys, state.values, state.tail)),
        state.length,
        state.near,
    )
    kernels.fold_(layers, k.expand(3, *k.shape), v.expand(3, *v.shape), mask)
    return launches


def source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """As Triton specializes a call: strides of 1 and absent tensors are constants."""
    kernel, args, kwargs = launch
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    options = {k: v for k, v in kwargs.items() if k not in names}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes = {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def main(dtype: str, capability: str, settings: str) -> None:
    warnings.simplefilter("ignore")
    found: dict[str, dict[str, Any]] = {}
    for call in record(dtype=getattr(torch, dtype), **json.loads(settings)):
        code, options = source(call)
        compiled = triton.compile(
            code, target=GPUTarget("cuda", int(capability), 32), options=options
        )
        found[code.hash()] = {
            "name": call[0].__name__,
            "shared": compiled.metadata.shared,
        }
    print(json.dumps(list(found.values())))


if __name__ == "__main__":
    main(*sys.argv[1:])
