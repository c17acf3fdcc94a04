"""How long a text may be, as the model has it."""

from __future__ import annotations

import pytest
import transformers

from linearized.speculative.limits import longest_text

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
LEARNED = [
    transformers.GPT2Config(vocab_size=61, n_positions=48, n_embd=32, n_layer=1, n_head=4),
    transformers.OPTConfig(**SIZES, max_position_embeddings=48, ffn_dim=32, word_embed_proj_dim=32),
    transformers.GPTNeoConfig(
        vocab_size=61, hidden_size=32, max_position_embeddings=48, num_layers=1, num_heads=4,
        attention_types=[[["global"], 1]],
    ),
    transformers.GPTBigCodeConfig(vocab_size=61, n_positions=48, n_embd=32, n_layer=1, n_head=4),
    transformers.GPTJConfig(
        vocab_size=61, n_positions=48, n_embd=32, n_layer=1, n_head=4, rotary_dim=4
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", LEARNED, ids=lambda config: config.model_type)
def test_a_table_of_positions_is_a_limit(config):
    assert longest_text(transformers.AutoModelForCausalLM.from_config(config)) == 48


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**SIZES, intermediate_size=32, max_position_embeddings=48),
        transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4),
    ],
    ids=lambda config: config.model_type,
)
def test_positions_that_are_computed_are_none(config):
    assert longest_text(transformers.AutoModelForCausalLM.from_config(config)) is None
