"""Logits a few tokens at a time are those that the model gives of all of them."""

from __future__ import annotations

import pytest
import torch
import transformers

from linearized.errors import ModelError
from linearized.evaluation import logits
from linearized.evaluation.logits import Reading

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


def gemma():
    """Squashes its logits behind the output layer."""
    config = transformers.Gemma2Config(**SIZES, final_logit_softcapping=2.0)
    return transformers.Gemma2ForCausalLM(config)


def granite():
    """Divides its logits behind the output layer."""
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, logits_scaling=3.0))


def mixtral():
    """Gives what its routers say beside its hidden states."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    return transformers.MixtralForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture
def few(monkeypatch):
    """Logits of seven tokens at a time."""
    monkeypatch.setattr(logits, "CHUNK_BYTES", 7 * 61 * 4)


@pytest.mark.parametrize("make", [gemma, granite, mixtral, gpt2])
def test_chunks_are_what_the_model_says(few, make):
    torch.manual_seed(0)
    check(make().train())


def test_chunks_of_linear_models(few, llama, linear):
    check(llama())
    for near in ("", "hedgehog"):
        check(linear(dtype=torch.float32, near=near))
    check(linear(dtype=torch.float32, linearize=(0,)))


def check(model):
    was_training = model.training
    tokens = torch.randint(1, 61, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model.eval()(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    model.train(was_training)
    reading = Reading(model, tokens)
    parts = list(reading.chunks())
    assert [len(x) for _, x in parts] == [7, 7, 7, 7, 5]
    torch.testing.assert_close(torch.cat([x for _, x in parts]), want, rtol=1e-4, atol=1e-5)
    asked = torch.tensor([30, 2, 2])
    (part, found), *rest = reading.chunks(asked)
    assert part == slice(0, 3) and not rest
    torch.testing.assert_close(found, want[asked], rtol=1e-4, atol=1e-5)
    assert model.training == was_training
    with torch.no_grad():  # its body is back in its place
        again = model.eval()(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(again, want)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at what PEFT calls
def test_wrapped_by_peft(few, llama):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    check(model)


def test_what_has_no_output_layer_is_refused(llama):
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    for model in (t5, llama().model):
        with pytest.raises(ModelError, match="is no causal language model"):
            Reading(model, torch.ones(1, 4, dtype=torch.int64))
