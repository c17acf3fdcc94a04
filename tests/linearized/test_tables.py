"""Tables of positions: their length, and how encoder-decoder models read them."""

from __future__ import annotations

import pytest
import torch
import transformers

import linearized
from linearized.cache import CACHE
from linearized.errors import StateError
from linearized.tables import context_limit

FAMILIES = ["Bart", "MBart", "Marian", "Pegasus", "M2M100"]
SIZES = {
    "vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "max_position_embeddings": 40, "init_std": 0.2, "eos_token_id": 2,
    "decoder_start_token_id": 2, "bos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip


def tokens_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 61, (rows, length), generator=generator)


@pytest.fixture(params=FAMILIES)
def crossing(request):
    config = getattr(transformers, f"{request.param}Config")(**SIZES)
    torch.manual_seed(0)
    made = transformers.AutoModelForSeq2SeqLM.from_config(config).double().eval()
    return linearized.linearize(made, linearized.LinearConfig(attention="grouped", group=8, taps=5))


@torch.no_grad()
def test_a_decoder_counts_positions_from_its_state(crossing):
    source, target = tokens_of(2, 11), tokens_of(2, 19, seed=1)
    want = crossing(input_ids=source, decoder_input_ids=target, use_cache=False).logits
    for size in (19, 5, 1):
        state = linearized.encode(crossing, source)
        parts = [linearized.extend(crossing, part, state) for part in target.split(size, dim=1)]
        assert (torch.cat(parts, dim=1) - want).abs().max() < 1e-9
    state = linearized.encode(crossing, source)
    mask = torch.ones_like(target[:, :4])
    mask[0, 2:] = 0
    linearized.extend(crossing, target[:, :4], state, mask=mask)  # rows of lengths 2 and 4
    tree = torch.tensor([[-1, -1, 1], [-1, 0, -1]])
    nodes = torch.stack([target[0, [9, 2, 3]], target[1, [4, 5, 9]]])
    logits, pending = linearized.verify(crossing, nodes, tree, state)
    assert (logits[0, 1:] - want[0, 2:4]).abs().max() < 1e-9
    assert (logits[1, :2] - want[1, 4:6]).abs().max() < 1e-9
    linearized.commit(state, pending, [[1, 2], [0, 1]])
    after = torch.stack([target[0, 4:9], target[1, 6:11]])
    logits = linearized.extend(crossing, after, state)
    assert (logits[0] - want[0, 4:9]).abs().max() < 1e-9
    assert (logits[1] - want[1, 6:11]).abs().max() < 1e-9


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config).double().eval()


def opt():
    config = transformers.OPTConfig(
        vocab_size=61, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, word_embed_proj_dim=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.OPTForCausalLM(config).double().eval()


@pytest.mark.parametrize("family", [gpt2, opt])
def test_a_text_longer_than_the_table_is_refused_before_it_is_read(family):
    model = family()
    linearized.linearize(model, linearized.LinearConfig(attention="grouped"))
    assert context_limit(model) == context_limit(model.base_model) == 16
    state = linearized.new_state(model)
    linearized.extend(model, tokens_of(1, 14), state)
    refused = pytest.raises(StateError, match="14 tokens cannot be extended by 3.*positions for 16")
    with refused:
        linearized.extend(model, tokens_of(1, 3), state)
    with refused:
        linearized.verify(model, tokens_of(1, 3), torch.tensor([[-1, 0, 1]]), state)
    assert state.length.item() == 14
    wide = torch.tensor([[-1, -1, 0, 1]])  # of four nodes, but two deep
    linearized.verify(model, tokens_of(1, 4), wide, state)
    linearized.extend(model, tokens_of(1, 2), state)
    with torch.no_grad(), pytest.raises(StateError, match="positions for 16"):
        model(input_ids=tokens_of(1, 17), **{CACHE: transformers.DynamicCache()})


def test_rotary_models_know_no_last_length(llama):
    assert context_limit(llama()) is None


SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
LEARNED = [
    transformers.GPT2Config(vocab_size=61, n_positions=48, n_embd=32, n_layer=1, n_head=4),
    transformers.OPTConfig(**SMALL, max_position_embeddings=48, ffn_dim=32, word_embed_proj_dim=32),
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
    assert context_limit(transformers.AutoModelForCausalLM.from_config(config)) == 48


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**SMALL, intermediate_size=32, max_position_embeddings=48),
        transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4),
    ],
    ids=lambda config: config.model_type,
)
def test_positions_that_are_computed_are_none(config):
    assert context_limit(transformers.AutoModelForCausalLM.from_config(config)) is None
