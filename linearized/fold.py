"""The one writer of decode states: new tokens, or the accepted nodes of a tree, are folded in.
Knows states and what forwards leave; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linearized import ops
from linearized.state import DecodeState, Fresh


def fold(
    state: DecodeState,
    fresh: Fresh,
    mask: Tensor | None = None,
    counts: Sequence[int] | None = None,
) -> None:
    """Take all of `fresh` into the state, in place, or the tokens that `mask` [B, T] keeps.
    `counts` [B] says how many these are, where it is known without looking."""
    if state.history is not None and fresh.history is not None:
        state.history.append(*fresh.history, state.length, mask, counts)
    if state.shift is not None and fresh.shift is not None:
        state.shift.copy_(_newest(state.shift, fresh.shift, mask))
    if state.num_layers:
        kept = None if mask is None else mask.bool()
        ops.fold_(state.layers, *fresh.layers, kept, backend=fresh.backend)
    elif fresh.history is not None:
        state.length.add_(fresh.history[0].shape[3] if mask is None else mask.sum(1))
    state.written()


def accept(state: DecodeState, fresh: Fresh, path: Sequence[Sequence[int]]) -> None:
    """Take the nodes of one path down each row's tree into the state, in place. The paths are not
    checked."""
    lengths = [len(nodes) for nodes in path]
    longest = max(lengths, default=0)
    if longest == 0:
        return
    if state.length.is_cuda or state.history is not None or len(set(lengths)) == 1:
        _accept(state, fresh, path, lengths, longest)
        return
    for row, nodes in enumerate(path):  # on a CPU shorter than masks and indices for all of them
        if nodes:
            part = slice(row, row + 1)
            _accept(state.rows(row, row + 1), fresh.rows(row, row + 1), path[part], lengths[part],
                    len(nodes))  # fmt: skip


def _accept(
    state: DecodeState,
    fresh: Fresh,
    path: Sequence[Sequence[int]],
    lengths: Sequence[int],
    longest: int,
) -> None:
    device = state.length.device
    mask = None
    if min(lengths) < longest:
        counts = torch.tensor(lengths).to(device, non_blocking=True)
        mask = torch.arange(longest, device=device) < counts[:, None]
    if all(list(nodes) == list(range(len(nodes))) for nodes in path):
        accepted = fresh.first(longest)  # they stand there as they are to be taken
    else:
        nodes = [[*nodes, *[0] * (longest - len(nodes))] for nodes in path]
        accepted = fresh.at(torch.tensor(nodes).to(device, non_blocking=True))
    fold(state, accepted, mask, lengths)


def _newest(last: Tensor, new: Tensor, mask: Tensor | None) -> Tensor:
    """[L, B, C] of each row's last token: of [L, B, T, C] the last that `mask` [B, T] keeps, and
    `last` [L, B, C] where it keeps none."""
    if mask is None:
        return new[:, :, -1]
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    newest = (mask.long() * columns).amax(1)
    rows = torch.arange(len(mask), device=mask.device)
    return torch.cat([last[:, :, None], new], dim=2)[:, rows, newest]
