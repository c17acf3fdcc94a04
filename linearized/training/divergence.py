"""Losses of a large vocabulary without its logits: from hidden states, some positions at a time.
Knows hidden states and output matrices; knows no model.

Logits of 2,048 positions and 50,000 words are 400 MB, and a loss with its gradient touches them a
dozen times. Here some positions' are made, used for loss and gradient, and let go of. (As in Hsu et
al., "Liger Kernel", 2024.)

N positions, C and C' hidden widths of student and teacher, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

POSITIONS = 128
"""Whose logits are made at once."""


def linear_divergence(
    hidden: Tensor,
    matrix: Tensor,
    wanted_hidden: Tensor,
    wanted_matrix: Tensor,
    labels: Tensor | None = None,
    *,
    text: float = 0.0,
    positions: int = POSITIONS,
) -> Tensor:
    """(1 - text) × the Kullback–Leibler divergence of softmax(hidden · matrixᵀ) from
    softmax(wanted_hidden · wanted_matrixᵀ), plus text × the negative log-likelihood of `labels` [N]
    (-100: of none), summed over positions, in nats.

    `hidden` [N, C], `matrix` [V, C], `wanted_hidden` [N, C'], `wanted_matrix` [V, C']. The gradient
    goes to `hidden` and `matrix`. Inside autocast, products are of its type; all else is float32.
    """
    found: Tensor = _Divergence.apply(
        hidden, matrix, wanted_hidden.detach(), wanted_matrix.detach(), labels, text, positions
    )
    return found


class _Divergence(torch.autograd.Function):
    """Works the gradient out beside the loss, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor,
        wanted_hidden: Tensor,
        wanted_matrix: Tensor,
        labels: Tensor | None,
        text: float,
        positions: int,
    ) -> Tensor:
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        same = matrix.data_ptr() == wanted_matrix.data_ptr() and matrix.shape == wanted_matrix.shape
        with torch.autocast(device, enabled=False):
            narrow = matrix.to(dtype)
            wanted_narrow = narrow if same else wanted_matrix.to(dtype)
            to_hidden = to_matrix = None
            if ctx.needs_input_grad[0]:
                to_hidden = torch.empty_like(hidden, dtype=wide)
            if ctx.needs_input_grad[1]:
                to_matrix = torch.zeros_like(matrix, dtype=wide)
            total = hidden.new_zeros((), dtype=torch.float64)
            for first in range(0, len(hidden), positions):
                part = slice(first, first + positions)
                own = hidden[part].to(dtype)
                logits = F.linear(own, narrow).to(wide)
                wanted = F.linear(wanted_hidden[part].to(dtype), wanted_narrow).to(wide)
                given = None if labels is None or not text else labels[part]
                loss, slope = _loss(logits, wanted, given, text)
                total += loss
                slope = slope.to(dtype)
                if to_hidden is not None:
                    to_hidden[part] = slope @ narrow
                if to_matrix is not None:
                    to_matrix += slope.t() @ own
        ctx.types = hidden.dtype, matrix.dtype
        ctx.save_for_backward(to_hidden, to_matrix)
        return total.to(wide)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if x is None else (x * grad).to(dtype)
            for x, dtype in zip(ctx.saved_tensors, ctx.types, strict=True)
        )  # fmt: skip
        return *scaled, None, None, None, None, None


def _loss(
    logits: Tensor, wanted: Tensor, labels: Tensor | None, text: float
) -> tuple[Tensor, Tensor]:
    """Summed loss of [N, V] logits, and its slope along them; both tensors are used up."""
    logits -= logits.logsumexp(-1, keepdim=True)
    wanted -= wanted.logsumexp(-1, keepdim=True)
    probable = wanted.exp()
    wanted -= logits
    loss = (1 - text) * torch.dot(probable.flatten(), wanted.flatten()).double()
    chosen = None
    if labels is not None:
        kept = labels >= 0
        chosen = labels.clamp(min=0)[:, None]
        loss = loss - text * logits.gather(1, chosen)[kept].double().sum()
    slope = logits.exp_()
    if chosen is None or labels is None:
        return loss, slope.sub_(probable).mul_(1 - text)
    share = torch.where(labels >= 0, 1.0, 1.0 - text).to(slope.dtype)[:, None]
    slope.mul_(share).sub_(probable, alpha=1 - text)
    slope.scatter_add_(1, chosen, torch.where(labels >= 0, -text, 0.0).to(slope.dtype)[:, None])
    return loss, slope
