"""One segment of a sequence in chunks: outputs, and the memory carried on. Differentiable. Knows
products of small matrices; knows nothing of the walk from segment to segment.

B batch, H query heads, K key/value heads, R = H/K, X width of queries and keys, F of features, U
of values, G chunk size, C chunks of the segment, W chunks of the window, J near keys, M taps.
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
        """Of the chunks that lie a window before these, which ones' memories a chunk reads,
        [.., C+1, C], and whether it reads the memory that was carried to the segment, [B, C+1]
        (None: it does). Row C is the segment after."""
        own = torch.arange(first, last, device=device)
        rows = torch.arange(first, last + 1, device=device)[:, None]
        reads = (own < rows) if self.form.causal else (own != rows)
        if self.start is None:
            return reads, None
        start = F.pad(self.start[:, first : last + 1], (0, max(0, last + 1 - self.num_chunks)))
        reads = reads & (own - self.form.window >= start[:, :, None])
        if not self.form.causal:
            reads = reads & (start[:, None, :-1] == start[:, :, None])
        return reads[:, None], start == start[:, :1]

    def ranks(self, first: int, last: int, device: torch.device) -> Tensor:
        """[B or 1, C], groups of its document before each chunk; less than 0 before slot 0."""
        chunks = torch.arange(first, last, device=device)[None]
        if self.start is None:
            return chunks
        start = self.start[:, max(first, 0) : max(last, 0)]
        return chunks - F.pad(start, (chunks.shape[1] - start.shape[1], 0))


def attend_segment(
    q: Tensor,  # [B, H, C·G, X]
    k: Tensor,  # [B, K, (W+C)·G, X], those of W chunks before, the window, and of the segment
    v: Tensor,
    sink_keys: Tensor | None,  # [B, K, C or 1, sinks, X]
    sink_values: Tensor | None,
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
    alpha, taps, sink_keys, sink_values = (
        None if x is None else x.to(wide) for x in (alpha, taps, sink_keys, sink_values)
    )
    if sink_keys is not None and walk.unit_norm:
        sink_keys = unit(sink_keys)
    batch, heads, padded, _ = q.shape
    kv_heads, chunks = k.shape[1], padded // chunk
    repeats = heads // kv_heads

    def chunked(x: Tensor) -> Tensor:  # [B, K, (W+C)·G, X] -> [B, K, W+C, G, X]
        return x.contiguous().view(batch, kv_heads, x.shape[2] // chunk, chunk, x.shape[-1])

    # [B, H, C·G, X] -> [B, K, C, R·G, X]: the queries of a key/value head in one product
    queries = q.reshape(batch, kv_heads, repeats, chunks, chunk, q.shape[-1]).transpose(2, 3)
    queries = queries.reshape(batch, kv_heads, chunks, repeats * chunk, q.shape[-1])
    keys, values = chunked(k), chunked(v)
    features = keys[:, :, :chunks, :, keys.shape[-1] - form.features :]  # far from a window on
    memories, memory = _memories(features, values[:, :, :chunks], memory, walk, first)
    if form.inside == "slots":
        out = _slots(queries, features, values, memories, walk)
    else:
        scaled = queries[..., queries.shape[-1] - form.features :]
        if alpha is not None and form.features:
            scaled = scaled * alpha.repeat_interleave(chunk).view(kv_heads, 1, -1, 1)
        seen = _seen(walk, first, chunks, k.device)
        near = far = None
        if taps is not None:
            near, far = _toeplitz(taps, kv_heads, walk)
            if seen is not None:
                near = near * seen
        near_keys = _near(keys, sink_keys, form.window)
        weights = _weights(queries, near_keys, scaled, near, seen, walk, first)
        out = _sum(weights, _near(values, sink_values, form.window), scaled, memories)
        if far is not None and far.shape[-1]:
            out += _convolve(far, _windows(values[:, :, form.window :], past, walk, first))
    out = out.view(batch, kv_heads, chunks, repeats, chunk, -1).transpose(2, 3)
    return out.reshape(batch, heads, padded, -1)[:, :, :num_slots].to(dtype), memory


def _near(x: Tensor, sinks: Tensor | None, window: int) -> Tensor:
    """[B, K, W+C, G, X] to what each chunk's queries may be near to, [B, K, C, J, X]: sinks, the
    chunks of the window, its own."""
    if not window and sinks is None:
        return x
    chunks = x.shape[2] - window
    parts = [x[:, :, back : back + chunks] for back in range(window + 1)]
    if sinks is not None:
        parts.insert(0, sinks.expand(-1, -1, chunks, -1, -1))
    return torch.cat(parts, dim=3)


def _seen(walk: Walk, first: int, chunks: int, device: torch.device) -> Tensor | None:
    """[B or 1, 1, C, 1, J], are a chunk's near keys there, and of its document? None: all are. A
    sink that is in the window is there once, in the window."""
    window, sinks = walk.form.window, walk.form.sinks
    if not (window or sinks) or (walk.start is None and first > window):
        return None
    ranks = walk.ranks(first, first + chunks, device)[:, :, None]
    back = torch.arange(window, -1, -1, device=device).repeat_interleave(walk.chunk)
    there = ranks >= back
    if sinks:
        there = torch.cat([(ranks > window).expand(-1, -1, sinks), there], dim=2)
    return there[:, None, :, None]


def _memories(
    features: Tensor, values: Tensor, memory: Tensor, walk: Walk, first: int
) -> tuple[Tensor, Tensor]:
    """What each chunk reads, [B, K, C, F, U], and what is carried on, [B, K, F, U]; of the features
    and values a window before."""
    batch, kv_heads, chunks, _, num_features = features.shape
    width, form = values.shape[-1], walk.form
    if not num_features:
        return memory.new_zeros(batch, kv_heads, chunks, 0, width), memory
    if form.sinks:
        begins = walk.ranks(first - form.window, first - form.window + chunks, features.device) == 0
        sinks = torch.arange(walk.chunk, device=features.device) < form.sinks
        features = features.masked_fill((begins[:, :, None] & sinks)[:, None, :, :, None], 0)
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
    """Of the near pairs and of what is remembered, [B, K, C, R·G, U]."""
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
    near: Tensor | None,
    seen: Tensor | None,
    walk: Walk,
    first: int,
) -> Tensor | None:
    """Weights of the near pairs, [B, K, C, R·G, J], the convolution's included."""
    form = walk.form
    if form.inside == "none":
        if near is None:
            return None
        return near.expand(*queries.shape[:3], -1, -1)
    if form.inside == "linear":
        scores = scaled @ keys[..., keys.shape[-1] - form.features :].transpose(-1, -2)
    else:
        inside = queries.shape[-1] - form.features or queries.shape[-1]
        scores = queries[..., :inside] @ keys[..., :inside].transpose(-1, -2)
    if form.inside == "relu2":
        roots = _masked(scores, walk, seen).relu_()
        return roots.square() if near is None else torch.addcmul(near, roots, roots)
    if form.inside == "laplace":
        scores = torch.erf((scores - 0.5**0.5) * (2 * torch.pi) ** 0.5).add(1) / 2
    if form.inside == "softmax":
        weights = _softmax(scores, walk, seen, first)
    else:
        weights = _masked(scores, walk, seen)
    return weights if near is None else weights + near


def _masked(scores: Tensor, walk: Walk, seen: Tensor | None = None) -> Tensor:
    """Zero where a query comes before a key, or does not see it, in place."""
    if walk.form.causal:
        chunk, width = walk.chunk, scores.shape[-1]
        scores.view(*scores.shape[:-2], -1, chunk, width).tril_(width - chunk)
    return scores if seen is None else scores.mul_(seen)


def _softmax(scores: Tensor, walk: Walk, seen: Tensor | None, first: int) -> Tensor:
    """exp(s - the largest s that the query sees)."""
    chunk, width, chunks = walk.chunk, scores.shape[-1], scores.shape[-3]
    if walk.form.causal:
        order = torch.ones(chunk, width, dtype=torch.bool, device=scores.device)
        order = order.tril(width - chunk).repeat(scores.shape[-2] // chunk, 1)
        seen = order if seen is None else order & seen
    elif walk.valid is None:
        slots = torch.arange(first * chunk, (first + chunks) * chunk, device=scores.device)
        seen = (slots < walk.num_slots).view(1, 1, chunks, 1, chunk)
    else:
        seen = walk.valid.view(len(walk.valid), 1, chunks, 1, chunk)
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~seen, lowest)
    return (scores - scores.amax(-1, keepdim=True)).exp() * seen


def _slots(
    queries: Tensor, features: Tensor, values: Tensor, memories: Tensor, walk: Walk
) -> Tensor:
    """Linformer: pick among the memory's rows, and be answered by them."""
    width = queries.shape[-1]
    keys, values = values[..., :width], values[..., width:]
    scores = _masked(queries @ keys.transpose(-1, -2), walk)
    picks = queries @ memories[..., :width].transpose(-1, -2)
    picks = (picks + scores @ features).softmax(-1)
    weights = _masked(picks @ features.transpose(-1, -2), walk)
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


def _toeplitz(taps: Tensor, kv_heads: int, walk: Walk) -> tuple[Tensor, Tensor]:
    """The convolution as weights [K, 1, R·G, J] for the slots of a chunk's near keys, and [K, R·G,
    M-1 or 2(M-1)] for those around them: none, if a window reaches as far."""
    form, chunk = walk.form, walk.chunk
    num_taps, tail = taps.shape[1], walk.num_tail
    zero = 0 if form.causal else tail  # the column of lag 0
    window = form.window * chunk if tail <= form.window * chunk else 0
    padded = F.pad(taps, (0, 1))  # column -1: out of reach
    rows = torch.arange(chunk, device=taps.device)[:, None]
    around = torch.arange(-tail, 0 if not window else -tail, device=taps.device)
    if not form.causal:
        around = torch.cat([around, torch.arange(chunk, chunk + tail, device=taps.device)])

    def weights(columns: Tensor) -> Tensor:
        lags = rows - columns + zero
        found = padded[:, torch.where((lags < 0) | (lags >= num_taps), num_taps, lags)]
        return found.view(kv_heads, len(taps) // kv_heads * chunk, len(columns))

    near = weights(torch.arange(-window, chunk, device=taps.device))
    missing = form.sinks + form.window * chunk - window
    return F.pad(near, (missing, 0))[:, None], weights(around)
