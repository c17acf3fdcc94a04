"""Medusa's heads: what they are at first, files, and whom they belong to."""

from __future__ import annotations

import json

import pytest
import torch

import linearized
from linearized.errors import ModelError
from linearized.medusa import RANKS, MedusaHeads, output_matrix


def heads_on(model, heads=3):
    return MedusaHeads.on(model, heads, linearized.fingerprint(model))


def test_at_first_every_head_guesses_what_the_target_says(linear):
    model = linear()
    heads = heads_on(model).double()
    hidden = torch.randn(2, 5, 32, dtype=torch.float64)
    matrix = output_matrix(model)
    for logits in heads(hidden, matrix):
        torch.testing.assert_close(logits, hidden @ matrix.t())


def test_they_come_back_from_their_folder(linear, tmp_path):
    heads = heads_on(linear())
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    heads.accuracies = [[0.5] * RANKS] * 3
    heads.save_pretrained(tmp_path)
    again = MedusaHeads.from_pretrained(tmp_path)
    assert again.accuracies == heads.accuracies and again.target == heads.target
    for mine, theirs in zip(heads.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_they_are_refused_by_another_model(linear):
    heads = heads_on(linear())
    with pytest.raises(ModelError, match="were trained on model"):
        heads.check(linearized.fingerprint(linear(seed=1)))


@pytest.mark.parametrize("damage", ["nothing", "format", "weights"])
def test_a_folder_that_cannot_be_read_says_why(linear, tmp_path, damage):
    if damage != "nothing":
        heads_on(linear()).save_pretrained(tmp_path)
    if damage == "format":
        settings = json.loads((tmp_path / "medusa.json").read_text())
        (tmp_path / "medusa.json").write_text(json.dumps({**settings, "format": "other"}))
    if damage == "weights":
        (tmp_path / "medusa.safetensors").write_bytes(b"cut short")
    with pytest.raises(ModelError, match="format|Medusa heads"):
        MedusaHeads.from_pretrained(tmp_path)


@torch.no_grad()
def test_right_counts_what_the_target_says(linear):
    """Heads that say again what the target has just said."""
    model = linear()
    heads = heads_on(model, 2).double()
    tokens = torch.randint(1, 60, (4, 30))
    found = heads.right(model, tokens)
    said = model(input_ids=tokens, use_cache=False).logits.argmax(-1)
    for head in range(2):
        wanted = said[:, 1 + head :]
        assert int(found[head, RANKS]) == wanted.numel()
        assert int(found[head, 0]) == int((said[:, : wanted.shape[1]] == wanted).sum())
        assert found[head, :RANKS].sum() <= wanted.numel()
