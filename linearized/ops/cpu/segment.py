"""One segment of a sequence in chunks: outputs, and the memory carried on. Differentiable. Knows
products of small matrices; knows nothing of the walk from segment to segment.

B batch, H query heads, K key/value heads, R = H/K, X width of queries and keys, F of features, U
of values, G chunk size, C chunks of the segment, M taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from linearized.ops.form import Form
from linearized.ops.reference import unit

CHUNK = 64
"""Chunk size where groups make no difference."""
SEGMENT = 1 << 12
"""Rows of queries (batch × heads × slots) in a segment."""


@dataclass(frozen=True, slots=True)
class Walk:
    """What does not change from segment to segment."""

    form: Form
    unit_norm: bool
    chunk: int
    num_slots: int
    num_chunks: int
    step: int
    """Chunks in a segment."""
    num_tail: int
    """M-1."""
    start: Tensor | None
    valid: Tensor | None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        form: Form,
        unit_norm: bool,
        taps: Tensor | None,
        start: Tensor | None,
        valid: Tensor | None,
    ) -> Walk:
        chunk = form.group if form.grouped else CHUNK
        num_chunks = -(-q.shape[2] // chunk)
        step = num_chunks
        if form.causal:
            rows = q.shape[0] * q.shape[1]
            memories = k.shape[0] * k.shape[1] * form.features * v.shape[3]
            fits = min(SEGMENT // (rows * chunk), 1024 * SEGMENT // max(memories, 1), 64)
            step = max(fits, 1)
        num_taps = 1 if taps is None else taps.shape[1]
        num_tail = num_taps - 1 if form.causal else num_taps // 2
        return cls(form, unit_norm, chunk, q.shape[2], num_chunks, step, num_tail, start, valid)

    def segments(self) -> list[tuple[int, int]]:
        """Chunks [first, last) of each."""
        firsts = range(0, self.num_chunks, self.step)
        return [(first, min(first + self.step, self.num_chunks)) for first in firsts]

    def prefix(self, first: int, last: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Which chunks' memories a chunk reads, [.., C+1, C], and whether it reads the memory that
        was carried to the segment, [B, C+1] (None: it does). Row C is the segment after."""
        own = torch.arange(first, last, device=device)
        rows = torch.arange(first, last + 1, device=device)[:, None]
        reads = (own < rows) if self.form.causal else (own != rows)
        if self.start is None:
            return reads, None
        start = F.pad(self.start[:, first : last + 1], (0, max(0, last + 1 - self.num_chunks)))
        reads = reads & (own >= start[:, :, None])
        if not self.form.causal:
            reads = reads & (start[:, None, :-1] == start[:, :, None])
        return reads[:, None], start == start[:, :1]


def attend_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    taps: Tensor | None,
    memory: Tensor,
    past: Tensor,  # [B, K, M-1, U], values before the segment
    walk: Walk,
    first: int,  # chunk
) -> tuple[Tensor, Tensor]:
    """Outputs of one segment, added up in the memory's type and rounded once, and the memory after
    it."""
    form, chunk = walk.form, walk.chunk
    num_slots = q.shape[2]
    missing = -num_slots % chunk
    if missing:
        q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
    dtype, wide = v.dtype, memory.dtype
    if walk.unit_norm:
        q, k = unit(q), unit(k)
    if dtype != wide or q.dtype != wide:  # sums of half precision, each rounded, drift apart
        q, k, v, past = q.to(wide), k.to(wide), v.to(wide), past.to(wide)
    alpha, taps = (None if x is None else x.to(wide) for x in (alpha, taps))
    batch, heads, padded, _ = q.shape
    kv_heads, chunks = k.shape[1], padded // chunk
    repeats = heads // kv_heads

    def chunked(x: Tensor) -> Tensor:  # [B, K, C·G, X] -> [B, K, C, G, X]
        return x.contiguous().view(batch, kv_heads, chunks, chunk, x.shape[-1])

    # [B, H, C·G, X] -> [B, K, C, R·G, X]: the queries of a key/value head in one product
    queries = q.reshape(batch, kv_heads, repeats, chunks, chunk, q.shape[-1]).transpose(2, 3)
    queries = queries.reshape(batch, kv_heads, chunks, repeats * chunk, q.shape[-1])
    keys, values = chunked(k), chunked(v)
    features = keys[..., keys.shape[-1] - form.features :]
    memories, memory = _memories(features, values, memory, walk, first)
    if form.inside == "slots":
        out = _slots(queries, features, values, memories, form.causal)
    else:
        scaled = queries[..., queries.shape[-1] - form.features :]
        if alpha is not None and form.features:
            scaled = scaled * alpha.repeat_interleave(chunk).view(kv_heads, 1, -1, 1)
        near = far = None
        if taps is not None:
            near, far = _toeplitz(taps, chunk, kv_heads, form.causal)
        weights = _weights(queries, keys, scaled, features, near, walk, first)
        out = _sum(weights, values, scaled, memories)
        if far is not None and walk.num_tail:
            out += _convolve(far, _windows(values, past, walk, first))
    out = out.view(batch, kv_heads, chunks, repeats, chunk, -1).transpose(2, 3)
    return out.reshape(batch, heads, padded, -1)[:, :, :num_slots].to(dtype), memory


def _memories(
    features: Tensor, values: Tensor, memory: Tensor, walk: Walk, first: int
) -> tuple[Tensor, Tensor]:
    """What each chunk reads, [B, K, C, F, U], and what is carried on, [B, K, F, U]."""
    batch, kv_heads, chunks, _, num_features = features.shape
    width = values.shape[-1]
    if not num_features:
        return memory.new_zeros(batch, kv_heads, chunks, 0, width), memory
    added = features.transpose(-1, -2) @ values  # B K C F U
    reads, carries = walk.prefix(first, first + chunks, features.device)
    sums = reads.to(added.dtype) @ added.view(batch, kv_heads, chunks, -1)
    sums = sums.view(batch, kv_heads, chunks + 1, num_features, width)
    if carries is None:
        sums += memory[:, :, None]
    else:
        sums += memory[:, :, None] * carries[:, None, :, None, None]
    return sums[:, :, :-1], sums[:, :, -1]


def _sum(weights: Tensor | None, values: Tensor, scaled: Tensor, memories: Tensor) -> Tensor:
    """Of the pairs in a chunk and of those before it, [B, K, C, R·G, U]."""
    if not scaled.shape[-1] and weights is not None:
        return weights @ values
    read = scaled @ memories
    if weights is not None:
        read.flatten(0, 2).baddbmm_(weights.flatten(0, 2), values.flatten(0, 2))
    return read


def _weights(
    queries: Tensor,
    keys: Tensor,
    scaled: Tensor,
    features: Tensor,
    near: Tensor | None,
    walk: Walk,
    first: int,
) -> Tensor | None:
    """Weights of the pairs in one chunk, [B, K, C, R·G, G], the convolution's included."""
    form = walk.form
    if form.inside == "none":
        if near is None:
            return None
        return near.expand(*queries.shape[:3], -1, -1)
    if form.inside == "linear":
        scores = scaled @ features.transpose(-1, -2)
    else:
        inside = queries.shape[-1] - form.features or queries.shape[-1]
        scores = queries[..., :inside] @ keys[..., :inside].transpose(-1, -2)
    if form.inside == "relu2":
        roots = _masked(scores, form.causal).relu_()
        return roots.square() if near is None else torch.addcmul(near, roots, roots)
    if form.inside == "laplace":
        scores = torch.erf((scores - 0.5**0.5) * (2 * torch.pi) ** 0.5).add(1) / 2
    if form.inside == "softmax":
        weights = _softmax(scores, walk, first)
    else:
        weights = _masked(scores, form.causal)
    return weights if near is None else weights + near


def _masked(scores: Tensor, causal: bool) -> Tensor:
    """Zero above the diagonal of each [G, G], in place."""
    if causal:
        group = scores.shape[-1]
        scores.view(*scores.shape[:-2], -1, group, group).tril_()
    return scores


def _softmax(scores: Tensor, walk: Walk, first: int) -> Tensor:
    """exp(s - the largest s that the query sees)."""
    chunk, chunks = scores.shape[-1], scores.shape[-3]
    if walk.form.causal:
        seen = torch.ones(chunk, chunk, dtype=torch.bool, device=scores.device).tril()
        seen = seen.repeat(scores.shape[-2] // chunk, 1)
    elif walk.valid is None:
        slots = torch.arange(first * chunk, (first + chunks) * chunk, device=scores.device)
        seen = (slots < walk.num_slots).view(1, 1, chunks, 1, chunk)
    else:
        seen = walk.valid.view(len(walk.valid), 1, chunks, 1, chunk)
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~seen, lowest)
    return (scores - scores.amax(-1, keepdim=True)).exp() * seen


def _slots(
    queries: Tensor, features: Tensor, values: Tensor, memories: Tensor, causal: bool
) -> Tensor:
    """Linformer: pick among the memory's rows, and be answered by them."""
    width = queries.shape[-1]
    keys, values = values[..., :width], values[..., width:]
    scores = _masked(queries @ keys.transpose(-1, -2), causal)
    picks = queries @ memories[..., :width].transpose(-1, -2)
    picks = (picks + scores @ features).softmax(-1)
    weights = _masked(picks @ features.transpose(-1, -2), causal)
    return weights @ values + picks @ memories[..., width:]


def _convolve(far: Tensor, windows: Tensor) -> Tensor:
    """[K, R·G, J] weights of [B, K, C, J, U] values: [B, K, C, R·G, U], one product a head."""
    batch, kv_heads, chunks, reach, width = windows.shape
    columns = windows.permute(1, 3, 0, 2, 4).reshape(kv_heads, reach, -1)
    out = (far @ columns).view(kv_heads, -1, batch, chunks, width)
    return out.permute(2, 0, 3, 1, 4)


def _windows(values: Tensor, past: Tensor, walk: Walk, first: int) -> Tensor:
    """The values that the convolution reaches outside a chunk, [B, K, C, M-1 or 2(M-1), U]."""
    batch, kv_heads, chunks, chunk, width = values.shape
    tail = walk.num_tail
    line = torch.cat([past, values.reshape(batch, kv_heads, -1, width)], dim=2)
    windows = line[:, :, : tail + (chunks - 1) * chunk].unfold(2, tail, chunk)
    reached = None
    if walk.start is not None:
        slots = torch.arange(-tail, 0, device=values.device)
        slots = slots + chunk * torch.arange(first, first + chunks, device=values.device)[:, None]
        start = walk.start[:, first : first + chunks]
        reached = slots >= start[:, :, None] * chunk  # B C M-1
    if not walk.form.causal:
        after = F.pad(line[:, :, tail + chunk :], (0, 0, 0, tail + chunk))
        after = after.unfold(2, tail, chunk)[:, :, :chunks]
        windows = torch.cat([windows, after], dim=-1)
        if reached is not None:
            assert walk.start is not None
            ends = _ends(walk.start, chunk)
            slots = torch.arange(tail, device=values.device)
            slots = slots + chunk * torch.arange(1, chunks + 1, device=values.device)[:, None]
            reached = torch.cat([reached, slots < ends[:, :, None]], dim=2)
    if reached is not None:
        windows = windows * reached[:, None, :, None, :]
    return windows.transpose(-1, -2)


def _ends(start: Tensor, chunk: int) -> Tensor:
    """[B, C], the slot after the last of each chunk's document."""
    return (start[:, :, None] == start[:, None, :]).sum(-1).add(start) * chunk


def _toeplitz(taps: Tensor, group: int, kv_heads: int, causal: bool) -> tuple[Tensor, Tensor]:
    """The convolution as weights [K, 1, R·G, G] for the slots of the own chunk, and [K, R·G, M-1
    or 2(M-1)] for those around it."""
    num_taps = taps.shape[1]
    tail = num_taps - 1 if causal else num_taps // 2
    zero = 0 if causal else tail  # the column of lag 0
    padded = F.pad(taps, (0, 1))  # column -1: out of reach
    rows = torch.arange(group, device=taps.device)[:, None]
    around = torch.arange(-tail, 0, device=taps.device)
    if not causal:
        around = torch.cat([around, torch.arange(group, group + tail, device=taps.device)])

    def weights(columns: Tensor) -> Tensor:
        lags = rows - columns + zero
        found = padded[:, torch.where((lags < 0) | (lags >= num_taps), num_taps, lags)]
        return found.view(kv_heads, len(taps) // kv_heads * group, len(columns))

    return weights(torch.arange(group, device=taps.device))[:, None], weights(around)
