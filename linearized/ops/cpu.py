"""Grouped linear attention in chunks of one group: time and memory linear in the tokens, built
from matrix products. Same functions as `reference`, for CPU and for any device without Triton.

B batch, H query heads, K key/value heads, R = H/K, T tokens, N tree nodes, D key width, E value
width, G group size, C groups, M taps. Tokens are laid out on the group grid: a token's slot is its
position less that of the open group's first token, so that slot // G is its group. Slots without
a token hold zero keys and values, which weigh nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from linearized.ops.reference import ancestors, unit
from linearized.state import GroupState


def attend(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, K, T, D]
    v: Tensor,  # [B, K, T, E]
    *,
    alpha: Tensor | None,  # [H]
    taps: Tensor | None,  # [H, M]
    group: int,
    state: GroupState | None = None,
    mask: Tensor | None = None,  # [B, T]
) -> Tensor:
    """Outputs [B, H, T, E] of T tokens that follow the state's in time; see `reference.attend`."""
    batch, heads, num_tokens, _ = q.shape
    kv_heads = k.shape[1]
    grid = _Grid.of(batch, num_tokens, group, state, mask, q.device)

    def per_kv_head(x: Tensor) -> Tensor:  # [B, H, C·G, X] -> [B, K, R, C, G, X]
        return x.reshape(batch, kv_heads, -1, grid.chunks, group, x.shape[-1])

    queries = per_kv_head(grid.place(unit(q)))
    keys = grid.place(unit(k))
    num_tail = 0 if taps is None else taps.shape[1] - 1
    past_values = grid.place(v, shift=num_tail)  # B K (M-1)+C·G E
    if state is not None:
        keys = grid.prepend(keys, state.keys)
        past_values = grid.prepend(past_values, state.values, shift=num_tail)
        if num_tail:
            past_values = grid.prepend_tail(past_values, state.tail)
    keys = per_kv_head(keys)
    values = per_kv_head(past_values[:, :, num_tail:].contiguous())

    weights = (queries @ keys.transpose(-1, -2)).relu().square().tril()  # B K R C G G
    if taps is not None:
        near, far = _toeplitz(taps, group)  # H G G, H G M-1
        weights = weights + near.view(kv_heads, -1, 1, group, group)
    out = weights @ values
    if taps is not None and num_tail:
        windows = past_values[:, :, : num_tail + (grid.chunks - 1) * group]
        windows = windows.unfold(2, num_tail, group).transpose(-1, -2)  # B K C M-1 E
        out = out + far.view(kv_heads, -1, 1, group, num_tail) @ windows[:, :, None]
    if alpha is not None:
        wide = torch.promote_types(k.dtype, torch.float32)
        added = keys[:, :, 0, :-1].transpose(-1, -2) @ values[:, :, 0, :-1]  # B K C-1 D E
        memory = F.pad(added.to(wide).cumsum(2), (0, 0, 0, 0, 1, 0))  # earlier groups only
        if state is not None:
            memory = memory + state.memory[:, :, None]
        scaled = queries * alpha.view(kv_heads, -1, 1, 1, 1)
        out = out + (scaled.to(wide) @ memory[:, :, None]).to(out.dtype)
    return grid.take(out.reshape(batch, heads, grid.chunks * group, -1))


@dataclass(frozen=True, slots=True)
class Nodes:
    """How the nodes of B trees lie to each other and to the state: the same for every layer, so
    worked out once a pass."""

    positions: Tensor  # [B, N], in the sequence
    same: Tensor  # [B, N, G+N], key in the node's own group, in the order open slots, nodes
    earlier: Tensor  # [B, N, G+N], key in an earlier group
    lags: Tensor  # [B, N, M-1+N], tokens back to each stored value and node; M: out of reach

    @classmethod
    def of(cls, parents: Tensor, length: Tensor, *, group: int, taps: int) -> Nodes:
        """`parents` [B, N], `length` [B], `taps` the number M (1 without a convolution)."""
        visible = ancestors(parents)  # B N N
        positions = length[:, None] + visible.sum(-1) - 1  # B N
        groups = positions // group
        here = (groups == (length // group)[:, None])[:, :, None].expand(-1, -1, group)
        same = visible & (groups[:, :, None] == groups[:, None, :])
        back = torch.arange(taps - 1, 0, -1, device=parents.device)  # of stored values, to length
        to_tail = (positions - length[:, None])[:, :, None] + back
        to_nodes = torch.where(visible, positions[:, :, None] - positions[:, None, :], taps)
        return cls(
            positions=positions,
            same=torch.cat([here, same], dim=2),
            earlier=torch.cat([~here, visible & ~same], dim=2),
            lags=torch.cat([to_tail, to_nodes], dim=2).clamp(max=taps),
        )


def attend_tree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parents: Tensor | Nodes,
    state: GroupState,
    *,
    alpha: Tensor | None,
    taps: Tensor | None,
    group: int,
) -> Tensor:
    """Outputs [B, H, N, E] of N tree nodes; see `reference.attend_tree`. `parents` may be given
    as the `Nodes` worked out for them."""
    if isinstance(parents, Tensor):
        parents = Nodes.of(parents, state.length, group=group, taps=state.taps)
    batch, heads, num_nodes, width = q.shape
    kv_heads = k.shape[1]
    queries = unit(q).reshape(batch, kv_heads, -1, width)  # B K R·N D
    keys = torch.cat([state.keys, unit(k)], dim=2)

    def per_query_head(x: Tensor) -> Tensor:  # [B, K, R·N, X] -> [B, H, N, X]
        return x.view(batch, heads, num_nodes, -1)

    scores = per_query_head(queries @ keys.transpose(-1, -2))
    weights = scores.relu().square() * parents.same[:, None]
    if alpha is not None:
        weights = weights + alpha[:, None, None] * scores * parents.earlier[:, None]
    values = torch.cat([state.values, v], dim=2)
    out = _mix(weights, values)
    if alpha is not None:
        past = queries.to(state.memory.dtype) @ state.memory
        out = out + alpha[:, None, None] * per_query_head(past).to(out.dtype)
    if taps is not None:
        reach = F.pad(taps, (0, 1))[:, parents.lags].transpose(0, 1)  # B H N M-1+N
        out = out + _mix(reach, torch.cat([state.tail, v], dim=2))
    return out


def fold(state: GroupState, k: Tensor, v: Tensor, mask: Tensor | None = None) -> GroupState:
    """The state after T more tokens; see `reference.fold`. The given state is unchanged."""
    rows, _, num_tokens, _ = k.shape
    grid = _Grid.of(rows, num_tokens, state.group, state, mask, k.device)
    count = torch.full_like(state.length, num_tokens) if mask is None else mask.sum(1)
    keys = grid.prepend(grid.place(unit(k)), state.keys)  # B K C·G D
    values = grid.prepend(grid.place(v), state.values)
    closed = (state.length % state.group + count) // state.group * state.group  # B slots
    memory = state.memory
    if bool(closed.any()):
        is_closed = torch.arange(keys.shape[2], device=k.device) < closed[:, None]
        wide = memory.dtype
        closed_keys = (keys * is_closed[:, None, :, None]).to(wide)
        memory = memory + closed_keys.transpose(-1, -2) @ values.to(wide)
    slots = closed[:, None] + torch.arange(state.group, device=k.device)  # B G
    tail = state.tail
    if tail.shape[2]:
        ranks = _Grid.of(rows, num_tokens, 1, None, mask, k.device)
        recent = torch.cat([tail, ranks.place(v)], dim=2)
        newest = count[:, None] + torch.arange(tail.shape[2], device=k.device)
        tail = _gather(recent, newest)
    return GroupState(
        memory=memory,
        keys=_gather(keys, slots),
        values=_gather(values, slots),
        tail=tail,
        length=state.length + count,
    )


@dataclass(frozen=True, slots=True)
class _Grid:
    """Where T tokens go on the group grid."""

    num_tokens: int
    chunks: int
    group: int
    slots: Tensor | None  # [B, T]; None: token t in slot t
    offset: Tensor | None  # [B], tokens already in the open group

    @classmethod
    def of(
        cls,
        batch: int,
        num_tokens: int,
        group: int,
        state: GroupState | None,
        mask: Tensor | None,
        device: torch.device,
    ) -> _Grid:
        if state is None and mask is None:
            return cls(num_tokens, -(-num_tokens // group), group, None, None)
        if mask is None:
            slots = torch.arange(num_tokens, device=device).expand(batch, -1)
        else:
            slots = mask.long().cumsum(1) - 1
        offset = None
        chunks = -(-num_tokens // group)
        if state is not None:  # the open group's tokens come first, at most G-1 of them
            offset = state.length % group
            slots = slots + offset[:, None]
            chunks = (num_tokens + group - 1) // group + 1
        if mask is not None:  # no token: to a slot beyond the grid, which is cut off
            slots = torch.where(mask.bool(), slots, chunks * group)
        return cls(num_tokens, chunks, group, slots, offset)

    def place(self, x: Tensor, *, shift: int = 0) -> Tensor:
        """[B, K, T, X] to [B, K, shift + C·G, X], `shift` empty slots first."""
        size = shift + self.chunks * self.group
        if self.slots is None:
            return F.pad(x, (0, 0, shift, size - shift - x.shape[2]))
        index = (self.slots + shift)[:, None, :, None].expand_as(x)
        return x.new_zeros(*x.shape[:2], size + 1, x.shape[3]).scatter(2, index, x)[:, :, :-1]

    def prepend(self, placed: Tensor, open_group: Tensor, *, shift: int = 0) -> Tensor:
        """Add the open group's slots; they are zero where the new tokens lie."""
        after = placed.shape[2] - shift - self.group
        return placed + F.pad(open_group, (0, 0, shift, after))

    def prepend_tail(self, placed: Tensor, tail: Tensor) -> Tensor:
        """Put the last M-1 values in the slots before the first new token. Those of the open
        group stand there already, as the same numbers."""
        assert self.offset is not None
        slots = self.offset[:, None] + torch.arange(tail.shape[2], device=tail.device)
        index = slots[:, None, :, None].expand_as(tail)
        return placed.scatter(2, index, tail)

    def take(self, x: Tensor) -> Tensor:
        """[B, H, C·G, X] back to [B, H, T, X]; zero where there is no token."""
        if self.slots is None:
            return x[:, :, : self.num_tokens]
        return _gather(F.pad(x, (0, 0, 0, 1)), self.slots)


def _gather(x: Tensor, slots: Tensor) -> Tensor:
    """[B, K, S, X] at [B, J] slots: [B, K, J, X]."""
    index = slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    """[B, H, N, J] weights of [B, K, J, E] values: [B, H, N, E]."""
    batch, heads, num_nodes, width = weights.shape
    rows = weights.reshape(batch, values.shape[1], -1, width)
    return (rows @ values).view(batch, heads, num_nodes, -1)


def _toeplitz(taps: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The convolution as weights of slot i for slot j of its own group [H, G, G] and for the M-1
    slots before the group [H, G, M-1]."""
    num_taps = taps.shape[1]
    padded = F.pad(taps, (0, 1))  # column M: out of reach
    rows = torch.arange(group, device=taps.device)[:, None]
    near = rows - torch.arange(group, device=taps.device)
    far = rows + torch.arange(num_taps - 1, 0, -1, device=taps.device)
    near = torch.where(near < 0, num_taps, near).clamp(max=num_taps)
    return padded[:, near], padded[:, far.clamp(max=num_taps)]
