"""A linear attention as a module: what its variants share. Knows the walk from projected queries,
keys and values to outputs; knows nothing of Hugging Face.

B batch, H query heads, K key/value heads, T tokens or tree nodes, D key width, E value width, X
width of queries and keys as the operator takes them, U of values, F of features (see
`linearized/ops/form.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearized import documents, ops
from linearized.config import LinearConfig
from linearized.errors import ConfigError
from linearized.state import GroupState


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a model an attention stands."""

    layer: int
    heads: int
    kv_heads: int
    width: int
    """Of a head's queries and keys."""
    value_width: int
    kind: str = "causal"
    """`causal`, `bidirectional`, or `cross`: from one text to another of any length."""
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None


def widen(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def outside_autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast halves the digits of whatever is multiplied; these sums go on over whole texts and
    keep theirs."""

    @functools.wraps(forward)
    def wrapped(self: nn.Module, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
        device = q.device.type
        if not torch.is_autocast_enabled(device):
            return forward(self, q, k, v, **settings)
        with torch.autocast(device, enabled=False):
            out, *kept = forward(self, widen(q), widen(k), widen(v), **settings)
        return out.to(v.dtype), *kept

    return wrapped


class LinearAttention(nn.Module):
    """Base of the variants. A variant says what pairs weigh (`form`), how `queries` and `tokens`
    enter the operator, and what becomes of its sums (`leave`)."""

    form: ops.Form
    alpha: nn.Parameter | None
    """[H], weight of pairs in different groups; None: 1."""
    taps: nn.Parameter | None
    """[H, M], column i the weight of the value i tokens back; [H, 2M-1] in both directions."""

    def __init__(self, config: LinearConfig, place: Place) -> None:
        super().__init__()
        self.place = place
        self.causal = place.kind == "causal"
        self.backend: str | None = None
        """None: choose. A name from `ops.BACKENDS`: that one."""
        self.alpha = None
        num_taps = config.taps if self.causal else 2 * config.taps - 1
        convolves = config.augment and place.kind != "cross"
        self.taps = self.zeros(place.heads, num_taps) if convolves else None

    def zeros(self, *shape: int) -> nn.Parameter:
        """A new parameter of the model's type, on its device."""
        return nn.Parameter(torch.zeros(shape, dtype=self.place.dtype, device=self.place.device))

    def drawn(self, seed: int, *shape: int) -> Tensor:
        """Normal random numbers, float64, of the seed and the layer alone."""
        generator = torch.Generator().manual_seed(seed + 7919 * self.place.layer)
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    def placed(self, numbers: Tensor) -> Tensor:
        """On the model's device, in float32 at least."""
        dtype = self.place.dtype or torch.get_default_dtype()
        return numbers.to(self.place.device, torch.promote_types(dtype, torch.float32))

    def near(self, config: LinearConfig) -> dict[str, int]:
        """A form's settings of what is near.

        Raises:
            ConfigError: a window, sinks or a bound where the text is read in both directions.
        """
        if self.place.kind == "cross":  # nothing is
            return {"group": config.group}
        if (config.window or config.sinks or config.bound is not None) and not self.causal:
            raise ConfigError(
                f"window={config.window}, sinks={config.sinks} and bound={config.bound} are for "
                "models that read one way, this one reads in both directions; leave them out"
            )
        return {"group": config.group, "window": config.window, "sinks": config.sinks}

    def queries(self, q: Tensor, scaling: float, positions: Tensor | None) -> Tensor:
        """q [B, H, T, D] at `positions` [B or 1, T] (None: in another text) to queries
        [B, H, T, X]; `scaling` is that of the softmax model."""
        return q

    def tokens(
        self, k: Tensor, v: Tensor, scaling: float, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """k [B, K, T, D], v [B, K, T, E] and `positions` [B or 1, T] to keys [B, K, T, X] and
        values [B, K, T, U], of which v is the last E columns."""
        return k, v

    def scale(self) -> Tensor | None:
        """α, [H]."""
        return self.alpha

    def far_weight(self) -> tuple[nn.Parameter, float] | None:
        """The parameter behind α, and the number of it at which far pairs weigh nothing."""
        return None if self.alpha is None else (self.alpha, 0.0)

    def sums(
        self, q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, values: Tensor, **where: Any
    ) -> Tensor:
        """The operator's sums, [B, H, T, U]."""
        sums = ops.linear_attention(
            queries,
            keys,
            values,
            form=self.form,
            alpha=self.scale(),
            taps=self.taps if self.fused else None,
            backend=self.backend,
            **where,
        )
        return self.with_gradient(sums, q, k, values, where["mask"], where["segments"])

    def with_gradient(
        self,
        sums: Tensor,
        q: Tensor,
        k: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """The same sums, with another gradient where they have none that is of use."""
        return sums

    def leave(self, sums: Tensor) -> Tensor:
        """The operator's sums [B, H, T, U] to outputs [B, H, T, E]."""
        return sums

    @property
    def fused(self) -> bool:
        """Are the operator's sums the outputs, so that it may convolve, too?"""
        return type(self).leave is LinearAttention.leave and self.form.inside != "slots"

    @outside_autocast
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float | None = None,
        state: GroupState | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        layout: ops.Layout | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, D], k [B, K, T, D], v [B, K, T, E] to outputs [B, H, T, E] and what a state
        folds in, keys [B, K, T, X] and values [B, K, T, U]. With `layout` the tokens are a tree's
        nodes on top of `state`; without, T tokens that follow it in time. `scaling` is that of the
        softmax model, D^-½ by default."""
        scaling = self.place.width**-0.5 if scaling is None else scaling
        positions = positions_of(k, state, mask, segments, layout)
        queries = self.queries(q, scaling, positions)
        keys, values = self.tokens(k, v, scaling, positions)
        where: dict[str, Any] = {"state": state, "mask": mask, "segments": segments}
        where["layout"] = layout
        out = self.leave(self.sums(q, k, queries, keys, values, **where))
        if self.taps is not None and not self.fused:
            own = values[..., values.shape[-1] - v.shape[-1] :]
            out = out + ops.convolve(
                own, self.taps, causal=self.causal, backend=self.backend, **where
            )
        return out.to(v.dtype), keys, values

    def empty_state(self, *leading: int, dtype: torch.dtype, device: torch.device) -> GroupState:
        """A state before the first token; `leading` is (B,) or (L, B)."""
        place = self.place
        with torch.no_grad():
            k = torch.zeros(1, place.kv_heads, 1, place.width, dtype=dtype, device=device)
            v = k.new_zeros(1, place.kv_heads, 1, place.value_width)
            positions = torch.zeros(1, 1, dtype=torch.int64, device=device)
            keys, values = self.tokens(k, v, 1.0, positions)
        return GroupState.empty(
            *leading,
            heads=place.kv_heads,
            features=self.form.features,
            key_width=keys.shape[-1],
            value_width=values.shape[-1],
            tail_width=place.value_width,
            near=self.form.near,
            taps=1 if self.taps is None else self.taps.shape[1],
            dtype=keys.dtype,
            device=device,
        )


class CrossAttention(nn.Module):
    """Attention from one text to another of any length, by way of a memory of fixed size. All its
    tokens are far ones of a variant: there are no groups, and no convolution."""

    def __init__(self, variant: LinearAttention) -> None:
        super().__init__()
        self.variant = variant

    @outside_autocast
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float | None = None,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """q [B, H, T, D] of one text, k [B, K, J, D] and v [B, K, J, E] of the other (those that
        `mask` [B, J] keeps) to outputs [B, H, T, E] and the memory [B, K, F, U] of the other text.
        Given that memory, k and v are not read."""
        variant = self.variant
        features = variant.form.features
        scaling = variant.place.width**-0.5 if scaling is None else scaling
        reading = memory is None
        if memory is None:
            keys, values = variant.tokens(k, v, scaling, positions_of(k, None, mask, None, None))
            memory = ops.remember(keys[..., keys.shape[-1] - features :], values, mask)
        queries = variant.queries(q, scaling, None)
        if variant.form.inside == "slots":
            sums = ops.pick(queries, memory)
        else:
            sums = ops.recall(queries[..., queries.shape[-1] - features :], memory, variant.scale())
        if reading:
            sums = variant.with_gradient(sums, q, k, values, mask)
        return variant.leave(sums).to(v.dtype), memory

    def empty_memory(self, *leading: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Of no text."""
        return self.variant.empty_state(*leading, dtype=dtype, device=device).memory


def positions_of(
    k: Tensor,
    state: GroupState | None,
    mask: Tensor | None,
    segments: Tensor | None,
    layout: ops.Layout | None,
) -> Tensor:
    """[B or 1, T], of each token in its document."""
    if layout is not None:
        return layout.positions
    if mask is None and segments is None:
        positions = torch.arange(k.shape[2], device=k.device)[None]
    else:
        positions = documents.positions(segments, mask)
    return positions if state is None else positions + state.length[:, None]
