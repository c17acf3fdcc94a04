"""What does not decode as it reads is refused before anybody trains it, and left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import linearized
from linearized.errors import ModelError

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 2, "num_key_value_heads": 4,
}  # fmt: skip
EXPERTS = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
REFUSED = {
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, "kind conv"),
    "Jamba": ({"num_experts": 2, "attn_layer_offset": 1, "attn_layer_period": 2,
               "mamba_d_state": 4, "mamba_dt_rank": 4}, "kind linear_attention"),
    "DeepseekV3": (LATENT, "of widths 16 and 8; its config promises"),
    "StableLm": ({}, "0 of 2 linear layers found the decode state"),
    "GptOss": ({**EXPERTS, "layer_types": ["full_attention"] * 2}, "GptOssAttention.*`s_aux`"),
}  # fmt: skip


def made(family: str, **settings):
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def as_it_is(model) -> dict:
    """All that linearizing might leave behind."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "configs": [id(m.__dict__.get("config")) for m in model.modules()],
        "config": copy.deepcopy(model.config).to_dict(),
        "attention": model.config._attn_implementation,
        "training": [m.training for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
    }


@pytest.mark.parametrize("family", REFUSED)
def test_the_reason_is_named_and_the_model_stays(family):
    settings, reason = REFUSED[family]
    model = made(family, **settings)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        before, want = as_it_is(model), model(input_ids=tokens).logits
    with pytest.raises(ModelError, match=f"{family}ForCausalLM cannot be linearized.*{reason}"):
        linearized.linearize(model, linearized.LinearConfig(attention="grouped"))
    assert as_it_is(model) == before
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, want)


def test_state_that_no_config_names():
    """A layer that remembers something besides attention."""
    model = made("Llama")

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]

    model.model.layers[1].mlp = Mean()
    before = as_it_is(model)
    for layers in (None, [0], []):
        with pytest.raises(ModelError, match="does not decode as it reads"):
            config = linearized.LinearConfig(attention="grouped", layers=layers)
            linearized.linearize(model, config)
        assert as_it_is(model) == before


def test_softmax_layers_that_do_more_are_refused():
    """Sinks, chunks: also where these layers are kept."""
    gpt = made("GptOss", **EXPERTS, layer_types=["sliding_attention", "full_attention"])
    llama = made("Llama4Text", **EXPERTS, attention_chunk_size=8, layer_types=[
        "chunked_attention", "full_attention"])  # fmt: skip
    for model, reason in ((gpt, "s_aux"), (llama, "kind chunked_attention")):
        before = as_it_is(model)
        for layers in ([1], []):
            with pytest.raises(ModelError, match=reason):
                config = linearized.LinearConfig(attention="grouped", layers=layers)
                linearized.linearize(model, config)
        assert as_it_is(model) == before


@pytest.mark.parametrize("layers", [None, [0], []])
def test_nothing_else_is_disturbed(llama, layers):
    model = llama().train()
    model.model.layers[1].eval()
    before = as_it_is(model)["training"]
    torch.manual_seed(5)
    numbers = torch.get_rng_state()
    linearized.linearize(model, linearized.LinearConfig(attention="grouped", layers=layers))
    linear = sum(2 for m in model.modules() if hasattr(m, "linear_attention"))
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), numbers)
    modes = [m.training for n, m in model.named_modules() if "linear_attention" not in n]
    assert modes == before and linear == 2 * (2 if layers is None else len(layers))
    assert all(p.grad is None for p in model.parameters())
    assert not any("fingerprint" in name for name in model.__dict__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_reason(llama, dtype):
    for layers in (None, [0]):
        model = llama(layers=3).to(dtype)
        linearized.linearize(model, linearized.LinearConfig(attention="grouped", layers=layers))


def test_weights_that_are_not_there_are_not_tried():
    with torch.device("meta"):
        model = made("Llama")
    linearized.linearize(model, linearized.LinearConfig(attention="grouped"))
    assert model.model.layers[0].self_attn.linear_attention.alpha.is_meta


def test_models_of_several_parts_are_refused():
    text = {**SIZES, "head_dim": 8, "model_type": "llama"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=96)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    before = as_it_is(model)
    with pytest.raises(ModelError, match="several parts.*the language model alone"):
        linearized.linearize(model, linearized.LinearConfig(attention="grouped"))
    assert as_it_is(model) == before
