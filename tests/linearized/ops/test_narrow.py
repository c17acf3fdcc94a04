"""Whole rows in half precision: the operator's numbers, and its gradients."""

from __future__ import annotations

import pytest
import torch

from linearized import ops

GROUP, WIDTH, FEATURES, VALUES = 4, 6, 5, 3


def inputs(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    """Of 4 query and 2 key/value heads: queries, keys, values, α."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries, keys = normal(2, 4, tokens, WIDTH + FEATURES), normal(2, 2, tokens, WIDTH + FEATURES)
    queries[..., WIDTH:].exp_()
    keys[..., WIDTH:].exp_()
    values = torch.cat([torch.ones(2, 2, tokens, 1), normal(2, 2, tokens, VALUES)], dim=-1)
    found = [queries, keys, values, normal(4).exp()]
    return [x.double().requires_grad_() for x in found]


def outputs(form: ops.Form, given: list[torch.Tensor], **how: torch.dtype) -> torch.Tensor:
    queries, keys, values, alpha = given
    if how:
        return ops.attend_narrow(queries, keys, values, form=form, alpha=alpha, least=1e-9, **how)
    sums = ops.linear_attention(queries, keys, values, form=form, alpha=alpha)
    return sums[..., 1:] / sums[..., :1]


@pytest.mark.parametrize("window,sinks", [(0, 0), (1, 0), (0, 2), (2, 4)])
@pytest.mark.parametrize("tokens", [1, 4, 11, 12, 13, 31, 40])
def test_it_is_the_operator(tokens, window, sinks):
    form = ops.Form(group=GROUP, inside="softmax", features=FEATURES, window=window, sinks=sinks)
    wanted, found = inputs(tokens), inputs(tokens)
    out, want = outputs(form, found, dtype=torch.float64), outputs(form, wanted)
    assert out.shape == want.shape
    torch.testing.assert_close(out, want)
    weights = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).view_as(want)
    (out * weights).sum().backward()
    (want * weights).sum().backward()
    for x, y in zip(found, wanted, strict=True):
        expected = torch.zeros_like(y) if y.grad is None else y.grad
        given = torch.zeros_like(x) if x.grad is None else x.grad
        if x is found[2]:  # nobody learns what a column of ones should be
            given, expected = given[..., 1:], expected[..., 1:]
        torch.testing.assert_close(given, expected)


def test_half_precision_is_near():
    form = ops.Form(group=GROUP, inside="softmax", features=FEATURES, window=2, sinks=2)
    given = [x.detach().float() for x in inputs(60)]
    out, want = outputs(form, given, dtype=torch.bfloat16), outputs(form, given)
    assert out.dtype == torch.float32
    assert 0 < (out - want).norm() / want.norm() < 1e-2
