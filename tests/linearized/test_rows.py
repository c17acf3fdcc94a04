"""Padding on either side and documents in a row change nothing, however they are told."""

from __future__ import annotations

import pytest
import torch
import transformers

import linearized
from linearized.cache import CACHE
from linearized.config import ATTENTIONS
from linearized.errors import ModelError
from linearized.models import new_parameters

SETTINGS = {"group": 8, "taps": 5, "features": 12, "hashes": 4, "bits": 3, "period": 11}
ONE = torch.arange(3, 21)[None]


def made(llama, attention="grouped", layers=None):
    model = llama().double()
    linearized.linearize(
        model, linearized.LinearConfig(attention=attention, layers=layers, **SETTINGS)
    )
    for parameter in new_parameters(model):
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def read(model, tokens, **given):
    return model(input_ids=tokens, use_cache=False, **given).logits


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padding_without_positions(llama, attention):
    model = made(llama, attention)
    want = read(model, ONE)
    padding, there = torch.zeros(1, 7, dtype=torch.int64), torch.ones_like(ONE)
    for parts, masks, kept in (
        ([padding, ONE], [padding, there], slice(7, None)),
        ([ONE, padding], [there, padding], slice(0, 18)),
        ([padding, ONE, padding], [padding, there, padding], slice(7, 25)),
    ):
        tokens, mask = torch.cat(parts, dim=1), torch.cat(masks, dim=1)
        assert (read(model, tokens, attention_mask=mask)[:, kept] - want).abs().max() < 1e-9
        with torch.no_grad():  # and in two passes
            cut = 12
            first = model(input_ids=tokens[:, :cut], attention_mask=mask[:, :cut],
                          **{CACHE: transformers.DynamicCache()})  # fmt: skip
            second = model(input_ids=tokens[:, cut:], attention_mask=mask,
                           **{CACHE: first[CACHE]})  # fmt: skip
        both = torch.cat([first.logits, second.logits], dim=1)
        assert (both[:, kept] - want).abs().max() < 1e-9


@pytest.mark.parametrize("layers", [None, [0], []])
@pytest.mark.parametrize("given", [
    {"segment_ids": torch.tensor([[4] * 18 + [2] * 18])},
    {"position_ids": torch.arange(18).repeat(2)[None]},
    {"position_ids": torch.arange(18).repeat(2)[None], "max_length_q": 18, "max_length_k": 18,
     "cu_seq_lens_q": torch.tensor([0, 18, 36]), "cu_seq_lens_k": torch.tensor([0, 18, 36])},
    {"cu_seq_lens_q": torch.tensor([0, 18, 36])},
    {"seq_idx": torch.tensor([[0] * 18 + [1] * 18], dtype=torch.int32)},
], ids=lambda given: "+".join(given))  # fmt: skip
def test_documents_in_a_row(llama, layers, given):
    model = made(llama, layers=layers)
    other = ONE.flip(1)
    packed = read(model, torch.cat([ONE, other], dim=1), **given)
    assert (packed[:, :18] - read(model, ONE)).abs().max() < 1e-9
    assert (packed[:, 18:] - read(model, other)).abs().max() < 1e-9


def test_positions_that_go_on_are_one_document(llama):
    model = made(llama)
    found = read(model, ONE, position_ids=torch.arange(18)[None] + 0)
    assert torch.equal(found, read(model, ONE))


def test_what_cannot_be_told_apart_is_refused(llama):
    model = made(llama)
    bounds = torch.tensor([0, 9, 18])
    with pytest.raises(ModelError, match="one row into documents, got 2 rows"):
        read(model, ONE.expand(2, -1), cu_seq_lens_q=bounds)
    with torch.no_grad(), pytest.raises(ModelError, match="cu_seq_lens_q puts several documents"):
        model(input_ids=ONE, cu_seq_lens_q=bounds, **{CACHE: transformers.DynamicCache()})
