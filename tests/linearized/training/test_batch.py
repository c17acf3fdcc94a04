"""Batches: split, cut and counted; documents of a row that do not see each other in any model."""

from __future__ import annotations

import pytest
import torch
import transformers

import linearized
from linearized.errors import ConfigError, ModelError
from linearized.flash import FlashConfig
from linearized.models import new_parameters
from linearized.training.batch import IGNORED, Batch, keep_apart

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "llama": transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "gpt2": transformers.GPT2Config(
        **SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
    "gemma2": transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=7,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "flash": FlashConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, head_dim=8, group=8, taps=5,
    ),
}  # fmt: skip
LENGTHS = (9, 1, 17, 3)


def model_of(kind: str, attention: str | None = None, layers=None):
    """A random model, float64; of `attention` in these layers."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind]).double().train()
    if attention is not None:
        config = linearized.LinearConfig(attention=attention, group=8, taps=5, layers=layers)
        linearized.linearize(model, config)
    for parameter in new_parameters(model):
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def packed() -> Batch:
    generator = torch.Generator().manual_seed(0)
    segments = [n for n, length in enumerate(LENGTHS) for _ in range(length)]
    return Batch(
        torch.randint(1, 61, (2, len(segments)), generator=generator),
        torch.tensor([segments, segments[::-1]]),
    )


def assert_apart(model) -> None:
    """Each document has the logits and gives the gradient that it does in a row of its own."""
    batch = packed()
    keep_apart(model)
    logits = model(**batch.inputs(model)).logits
    alone, at = [], 0
    lengths = {0: LENGTHS, 1: LENGTHS[::-1]}
    for row in (0, 1):
        at = 0
        for length in lengths[row]:
            one = Batch(batch.tokens[row : row + 1, at : at + length])
            alone.append(model(**one.inputs(model)).logits[0])
            at += length
    apart = torch.cat(alone).view_as(logits)
    assert (logits - apart).abs().max() < 1e-5
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    together, each = (
        torch.autograd.grad((x * weights).sum(), parameters, allow_unused=True)
        for x in (logits, apart)
    )
    for a, b in zip(together, each, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-5))

    # What one document says changes nothing in the others: no difference at all.
    with torch.no_grad():
        before = model(**batch.inputs(model)).logits
        batch.tokens[0, :9] = 60 - batch.tokens[0, :9]
        after = model(**batch.inputs(model)).logits
    assert torch.equal(before[0, 9:], after[0, 9:]) and torch.equal(before[1], after[1])
    assert not torch.equal(before[0, :9], after[0, :9])


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_leak_in_softmax_models_and_flash(kind):
    assert_apart(model_of(kind))


@pytest.mark.parametrize("attention", ["grouped", "hedgehog", "linformer"])
def test_documents_do_not_leak_in_linear_models(attention):
    assert_apart(model_of("llama", attention))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox"])
def test_documents_do_not_leak_in_linear_models_of_other_kinds(kind):
    assert_apart(model_of(kind, "grouped"))


def test_documents_do_not_leak_in_hybrids():
    assert_apart(model_of("qwen3", "grouped", layers=(1,)))


def test_a_model_that_cannot_keep_documents_apart_is_refused():
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.BloomForCausalLM(config)
    assert "segment_ids" not in Batch(packed().tokens).inputs(model)
    with pytest.raises(ModelError, match="BloomForCausalLM takes no position_ids"):
        keep_apart(model)


def test_a_model_that_leaks_is_refused(llama, monkeypatch):
    model = llama()
    forward = model.forward

    def deaf(input_ids, position_ids=None, attention_mask=None, **kwargs):
        return forward(input_ids=input_ids, use_cache=False)

    monkeypatch.setattr(model, "forward", deaf)
    with pytest.raises(ModelError, match="lets the documents of a row see each other"):
        keep_apart(model)


def test_rows_of_one_document_are_plain_inputs(llama):
    tokens = torch.tensor([[1, 2, 3]])
    assert set(Batch(tokens).inputs(llama())) == {"input_ids", "use_cache"}


def test_labels_and_predictions():
    tokens = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    assert Batch(tokens).labels().tolist() == [[IGNORED, 6, 7, 8], [IGNORED, 2, 3, 4]]
    assert Batch(tokens).predictions() == 6
    trained = torch.tensor([[False, True, False, True], [True, False, False, False]])
    batch = Batch(tokens, trained=trained)
    assert batch.labels().tolist() == [[IGNORED, 6, IGNORED, 8], [IGNORED] * 4]
    assert batch.predictions() == 2
    assert tokens.tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_are_the_whole(parts):
    batch = Batch(torch.arange(15).view(5, 3), torch.zeros(5, 3), torch.rand(5, 3) < 0.5)
    pieces = batch.split(parts)
    assert len(pieces) == parts
    for name in ("tokens", "segment_ids", "trained"):
        whole = torch.cat([getattr(piece, name) for piece in pieces])
        assert torch.equal(whole, getattr(batch, name))
    assert sum(piece.predictions() for piece in pieces) == batch.predictions()
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    assert batch.split(1)[0].to("cpu").tokens.tolist() == batch.tokens.tolist()


def test_the_first_tokens_of_rows():
    batch = Batch(torch.arange(8).view(2, 4), torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]]))
    short = batch.first(2)
    assert short.tokens.tolist() == [[0, 1], [4, 5]]
    assert short.segment_ids.tolist() == [[0, 0], [0, 0]] and short.trained is None


@pytest.mark.parametrize("parts", [0, 6])
def test_parts_that_cannot_be(parts):
    with pytest.raises(ConfigError, match=f"5 rows cannot be split into {parts}"):
        Batch(torch.zeros(5, 3)).split(parts)


@pytest.mark.parametrize("context", [1, 5])
def test_a_context_that_cannot_be(context):
    with pytest.raises(ConfigError, match=f"from 2 to the block's 4, got {context}"):
        Batch(torch.zeros(2, 4)).first(context)
