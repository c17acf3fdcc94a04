"""Which calls multiply in half precision, and that they say the same."""

from __future__ import annotations

import pytest
import torch

from linearized import ops
from linearized.attention import VARIANTS, Place
from linearized.config import LinearConfig

TOKENS = 45


@pytest.fixture
def made():
    torch.manual_seed(0)
    config = LinearConfig(attention="hedgehog", group=4, window=1, sinks=2, bound=8, taps=3)
    attention = VARIANTS["hedgehog"](config, Place(layer=0, heads=4, kv_heads=2, width=8,
                                                   value_width=8))  # fmt: skip
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, heads, TOKENS, 8, generator=generator) for heads in (4, 2, 2)]


@pytest.fixture
def narrow(monkeypatch):
    """How many calls went that way."""
    calls = []
    attend = ops.attend_narrow

    def counted(*arguments, **settings):
        calls.append(arguments)
        return attend(*arguments, **settings)

    monkeypatch.setattr(ops, "attend_narrow", counted)
    return calls


@torch.no_grad()
def test_whole_rows_say_the_same_within_rounding(made, given, narrow):
    want, keys, values = made(*given, scaling=0.3)
    one = torch.full((2, TOKENS), 7)
    for segments in (None, one):
        with torch.autocast("cpu", torch.bfloat16):
            out, *kept = made(*given, scaling=0.3, segments=segments)
        assert out.dtype == torch.float32
        assert 0 < (out - want).norm() / want.norm() < 1e-2
        torch.testing.assert_close(kept, [keys, values])
    assert len(narrow) == 2


@torch.no_grad()
def test_nothing_else_goes_that_way(made, given, narrow):
    documents = (torch.arange(TOKENS) > 20).long().expand(2, -1)
    padding = torch.arange(TOKENS).expand(2, -1) > 3
    state = made.empty_state(2, dtype=torch.float32, device=torch.device("cpu"))
    made(*given)
    with torch.autocast("cpu", torch.bfloat16):
        apart = made(*given, segments=documents)[0]
        alone = made(*(x[:, :, 21:] for x in given), state=state)[0]
        made(*given, mask=padding)
        made.backend = "reference"
        made(*given)
    assert not narrow
    torch.testing.assert_close(apart[:, :, 21:], alone, rtol=1e-2, atol=1e-2)
