"""Cutting heads, channels and layers out of a model."""

from __future__ import annotations

import pytest
import torch
import transformers

import linearized
from linearized.errors import ConfigError, ModelError
from linearized.training.pruning import Cut, prune


def batches():
    torch.manual_seed(1)
    return [torch.randint(1, 50, (2, 20)) for _ in range(2)]


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("linearize", [False, True])
def test_what_does_nothing_is_cut_and_changes_nothing(llama, linear, tmp_path, linearize):
    """Half of everything is silenced: cutting it leaves the model as it is."""
    model = linear(layers=4, dtype=torch.float64) if linearize else llama(layers=4).double()
    width = model.config.hidden_size // model.config.num_attention_heads
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            silent = 2 * width * (number % 2)  # a key/value head serves two query heads
            layer.self_attn.o_proj.weight[:, silent : silent + 2 * width] = 0
            layer.mlp.down_proj.weight[:, number % 2 :: 2] = 0
        for number in (1, 2):
            model.model.layers[number].self_attn.o_proj.weight.zero_()
            model.model.layers[number].mlp.down_proj.weight.zero_()
    tokens = torch.randint(1, 50, (2, 30))
    want = logits(model, tokens)
    if linearize:  # what is worked out of the larger model is not of the smaller one
        linearized.extend(model, tokens, linearized.new_state(model, 2))
    smaller = prune(model, batches(), Cut(layers=2, kv_heads=1, channels=32))
    assert torch.equal(logits(model, tokens), want)  # the larger one is left alone
    torch.testing.assert_close(logits(smaller, tokens), want)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    smaller.save_pretrained(tmp_path)
    loaded = linearized.load(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(loaded, tokens), want)
    if linearize:
        state = linearized.new_state(smaller, 2)
        parts = [linearized.extend(smaller, part, state) for part in tokens.split(7, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), want)


def test_gradients_are_as_they_were(linear):
    model = linear(layers=2).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    prune(model, batches(), Cut(layers=2, kv_heads=1, channels=8))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None for p in model.parameters())


def test_the_text_says_what_matters(llama):
    """Channels that the text never needs go first, however large their weights are."""
    model = llama(layers=2).double()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, :32] *= 0.01
    smaller = prune(model, batches(), Cut(layers=2, kv_heads=2, channels=32))
    for before, after in zip(model.model.layers, smaller.model.layers, strict=True):
        assert torch.equal(after.mlp.down_proj.weight, before.mlp.down_proj.weight[:, 32:])
        assert torch.equal(after.mlp.up_proj.weight, before.mlp.up_proj.weight[32:])


def test_errors(linear, llama):
    cut = Cut(layers=2, kv_heads=1, channels=8)
    for wrong, words in (
        (Cut(layers=1, kv_heads=1, channels=8), "layers must lie between 2 and 2.*got 1"),
        (Cut(layers=2, kv_heads=3, channels=8), "kv_heads must lie between 1 and 2.*got 3"),
        (Cut(layers=2, kv_heads=1, channels=0), "channels must lie between 1 and 64.*got 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            prune(linear(), batches(), wrong)
    with pytest.raises(ConfigError, match="no batch"):
        prune(linear(), [], cut)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50)
    with pytest.raises(ModelError, match="Llama family"):
        prune(transformers.GPT2LMHeadModel(config), batches(), cut)
    other = linearized.linearize(llama(), linearized.LinearConfig(attention="hedgehog"))
    with pytest.raises(ModelError, match="'hedgehog' cannot be pruned"):
        prune(other, batches(), cut)
