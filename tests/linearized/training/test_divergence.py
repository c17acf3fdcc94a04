"""Losses from hidden states: those of whole logits, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from linearized.training.divergence import linear_divergence


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (13, 6), (29, 6), (13, 4), (29, 4)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("positions", [1, 5, 13, 64])
@pytest.mark.parametrize("text", [0.0, 0.3, 1.0])
def test_it_is_the_loss_of_whole_logits(text, positions):
    hidden, matrix, wanted_hidden, wanted_matrix = inputs()
    labels = torch.arange(13) * 7 % 29
    labels[[2, 12]] = -100
    hidden.requires_grad_(), matrix.requires_grad_()
    logits, wanted = hidden @ matrix.T, wanted_hidden @ wanted_matrix.T
    told = F.cross_entropy(logits, labels, reduction="sum")
    apart = F.kl_div(
        logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum"
    )
    want = text * told + (1 - text) * apart
    expected = torch.autograd.grad(3 * want, [hidden, matrix])
    found = linear_divergence(
        hidden, matrix, wanted_hidden, wanted_matrix, labels, text=text, positions=positions
    )
    torch.testing.assert_close(found, want)
    for x, y in zip(torch.autograd.grad(3 * found, [hidden, matrix]), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_an_output_matrix_that_does_not_learn_has_no_gradient():
    hidden, matrix, *wanted = inputs()
    hidden.requires_grad_()
    linear_divergence(hidden, matrix, *wanted).backward()
    assert hidden.grad is not None and matrix.grad is None


def test_inside_autocast_sums_are_wide():
    given = inputs(torch.float32)
    given[0].requires_grad_()
    want = linear_divergence(*given)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_divergence(*given)
    found.backward()
    assert found.dtype == torch.float32 and given[0].grad.dtype == torch.float32
    torch.testing.assert_close(found, want, rtol=2e-2, atol=0)
