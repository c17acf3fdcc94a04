"""What a model asks of its attention is honoured or refused."""

from __future__ import annotations

import pytest
import torch
import transformers

import linearized
from linearized.callbacks import attend
from linearized.errors import ModelError


def made(llama, layers=None, **settings):
    model = llama(**settings)
    linearized.linearize(
        model, linearized.LinearConfig(attention="grouped", group=8, layers=layers)
    )
    return model


TOKENS = torch.arange(3, 23)[None]


@pytest.mark.parametrize("layers", [None, []], ids=["linear", "softmax"])
def test_unknown_arguments_are_refused_by_name(llama, layers):
    model = made(llama, layers)
    with torch.no_grad():
        want = model(input_ids=TOKENS, use_cache=False).logits
        for harmless in ({"s_aux": None}, {"colour": False}, {"output_attentions": False},
                         {"num_items_in_batch": torch.tensor(3)}):  # fmt: skip
            found = model(input_ids=TOKENS, use_cache=False, **harmless).logits
            assert torch.equal(found, want)
        for name, value in (("s_aux", torch.zeros(4)), ("colour", "red"), ("indices", [1])):
            with pytest.raises(ModelError, match=f"LlamaAttention asks its attention for `{name}`"):
                model(input_ids=TOKENS, use_cache=False, **{name: value})
        state = linearized.new_state(model)
        linearized.extend(model, TOKENS, state)


def test_masks_of_every_pair_are_refused(llama):
    model = made(llama)
    pairs = torch.ones(1, 1, 20, 20).tril().bool()
    with (
        torch.no_grad(),
        pytest.raises(ModelError, match=r"mask of 4 dimensions.*\[rows, tokens\]"),
    ):
        model(input_ids=TOKENS, attention_mask=pairs, use_cache=False)


def test_windows_and_directions_that_a_linear_layer_cannot_have(llama):
    module = made(llama).model.layers[0].self_attn
    q, k = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
    attend(module, q, k, k, None, is_causal=True)
    with pytest.raises(ModelError, match="`sliding_window`"):
        attend(module, q, k, k, None, sliding_window=3)
    with pytest.raises(ModelError, match="called with is_causal=False"):
        attend(module, q, k, k, None, is_causal=False)


@pytest.mark.parametrize("padded", [False, True])
def test_softmax_layers_drop_weights_in_training(padded):
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, attention_dropout=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    linearized.linearize(model, linearized.LinearConfig(attention="grouped", layers=[]))
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = int(not padded)
    given = {"input_ids": TOKENS, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        one, other = (model.train()(**given).logits for _ in range(2))
        assert not torch.allclose(one, other)
        assert torch.equal(model.eval()(**given).logits, model(**given).logits)
