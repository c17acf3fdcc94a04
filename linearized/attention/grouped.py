"""Grouped linear attention as a module: its parameters, and calls into `linearized.ops`.

Source: You et al., "When Linear Attention Meets Autoregressive Decoding", ICML 2024 (FLASH-style
local and global parts, masked depthwise convolution). Definitions: `linearized/ops/reference.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearized import ops
from linearized.config import LinearConfig
from linearized.state import GroupState


class GroupedAttention(nn.Module):
    """Exact relu² attention inside the open group, α times a linear state of earlier groups, and
    (with `augment`) the masked depthwise convolution. α and taps start at zero."""

    alpha: nn.Parameter | None
    """[H], weight of the earlier groups."""
    taps: nn.Parameter | None
    """[H, M], column i the weight of the value i tokens back."""

    def __init__(
        self,
        config: LinearConfig,
        *,
        heads: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.group = config.group
        self.backend: str | None = None
        """None: choose. A name from `ops.BACKENDS`: that one."""

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))

        self.alpha = zeros(heads) if config.attention == "grouped" else None
        self.taps = zeros(heads, config.taps) if config.augment else None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        state: GroupState | None = None,
        mask: Tensor | None = None,
        nodes: ops.Nodes | None = None,
    ) -> Tensor:
        """q [B, H, T, D], k [B, K, T, D], v [B, K, T, E] to [B, H, T, E]. With `nodes` the tokens
        are a tree's nodes on top of `state`; without, T tokens that follow it in time."""
        backend = ops.choose(self.backend)
        if nodes is None:
            return backend.attend(
                q,
                k,
                v,
                alpha=self.alpha,
                taps=self.taps,
                group=self.group,
                state=state,
                mask=mask,
            )
        return backend.attend_tree(
            q, k, v, nodes, state, alpha=self.alpha, taps=self.taps, group=self.group
        )
