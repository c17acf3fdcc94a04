"""Logits are float32 sums, whatever the weights are; texts in bfloat16 hardly depend on drafts."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch.nn import functional as F

import linearized
from linearized.head import OutputLinear, _Wide, widen_head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_float32_logits(dtype):
    head = OutputLinear(33, 70).to(dtype)
    x = torch.randn(2, 3, 33).to(dtype)
    with torch.no_grad():
        logits = head(x)
    want = F.linear(x.double(), head.weight.double(), head.bias.double())
    assert logits.dtype == torch.float32
    assert (logits - want).abs().max() < 1e-5
    assert head(x).dtype == dtype, "with a gradient, as anywhere else"


def test_writes_are_noticed():
    head = OutputLinear(33, 70, bias=False).bfloat16()
    x = torch.randn(1, 33).bfloat16()
    with torch.no_grad():
        before = head(x)
        head.weight.mul_(2)
        torch.testing.assert_close(head(x), 2 * before)
        head.weight.data.mul_(2)
        torch.testing.assert_close(head(x), 4 * before)
        head.weight = torch.nn.Parameter(head.weight * 2)
        torch.testing.assert_close(head(x), 8 * before)
        torch.testing.assert_close(copy.deepcopy(head)(x), 8 * before)


def test_the_head_stays_tied_saved_and_found(linear, tmp_path):
    model = linear(dtype=torch.bfloat16)
    assert isinstance(model.lm_head, OutputLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    head = model.lm_head
    widen_head(model)
    assert model.lm_head is head
    model.save_pretrained(tmp_path)
    loaded = linearized.load(tmp_path, dtype=torch.bfloat16)
    assert isinstance(loaded.lm_head, OutputLinear)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tokens = torch.randint(1, 60, (1, 20))
    logits = linearized.extend(loaded, tokens, linearized.new_state(loaded))
    assert logits.dtype == torch.float32


def test_bfloat16_texts_with_drafts_part_at_near_ties_only(linear):
    """What remains are the hidden vectors, which are rounded to bfloat16 between layers. Where a
    drafted text parts from the plain one, the two tokens are about equally probable."""
    model = linear(dtype=torch.bfloat16, layers=3, seed=1)
    draft = linear(dtype=torch.bfloat16, layers=1, seed=2)
    for seed in range(4):
        prompt = torch.randint(1, 60, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
        settings = {"max_new_tokens": 50, "stop_ids": [], "rows": 1}
        plain = linearized.generate(model, prompt, **settings)
        drafted = linearized.generate(model, prompt, drafter=draft, adaptive=False, **settings)
        if plain == drafted:
            continue
        place = next(
            i for i, pair in enumerate(zip(plain, drafted, strict=True)) if len({*pair}) > 1
        )
        state = linearized.new_state(model)
        logits = linearized.extend(model, torch.tensor([prompt + plain[:place]]), state)[0, -1]
        one, other = logits[plain[place]], logits[drafted[place]]
        assert (one - other).abs() < 0.02 * logits.abs().max()


def test_copies_are_kept_for_a_few_weights_and_no_longer_than_these():
    wide = _Wide(most=3)
    weights = [torch.nn.Parameter(torch.randn(40, 8).bfloat16()) for _ in range(5)]
    copies = [wide.of(weight) for weight in weights]
    assert all(
        wide.of(weight) is one for weight, one in list(zip(weights, copies, strict=True))[2:]
    )
    assert len(wide) == 3
    del weights
    gc.collect()
    assert not len(wide)
