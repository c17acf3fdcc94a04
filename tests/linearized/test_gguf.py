"""A GGUF file becomes an ordinary folder that computes what the model in it computed."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
import transformers

import linearized
from linearized.errors import ModelError
from linearized.gguf import convert


def _write(path, model, tokenizer_json, *, kind=None, leave_out=()):
    """As llama.cpp's converter writes a Llama with a byte-level vocabulary."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer_json["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([1] * len(vocabulary))
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer_json["model"]["merges"]]
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name in leave_out or name == "lm_head.weight":
            continue
        for part, count in heads.items():
            if part in name:  # llama.cpp pairs neighbours in rotary embeddings
                weight = weight.view(count, 2, -1, weight.shape[-1]).transpose(1, 2)
                weight = weight.reshape(-1, weight.shape[-1])
        array = weight.contiguous().numpy()
        key = names.get_name(name, try_suffixes=(".weight",))
        if kind is None or array.ndim < 2:
            writer.add_tensor(key, array)
        else:
            writer.add_tensor(key, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def small(tokenizer):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", [None, gguf.GGMLQuantizationType.Q8_0])
def test_the_folder_computes_what_the_model_did(small, tokenizer, tmp_path, kind):
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    _write(tmp_path / "small.gguf", small, text, kind=kind)
    convert(tmp_path / "small.gguf", tmp_path / "folder")
    model = linearized.load(tmp_path / "folder")
    assert model.config.tie_word_embeddings and model.dtype == torch.float32
    tokens = torch.from_numpy(np.arange(3, 43)[None])
    with torch.no_grad():
        found, want = model(tokens).logits, small(tokens).logits
    error = (found - want).norm() / want.norm()
    assert error < (1e-5 if kind is None else 0.05)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    sentence = "def main():\n    return 1"
    assert read.decode(read(sentence).input_ids, skip_special_tokens=True) == sentence
    linearized.linearize(model, linearized.LinearConfig.named("anchored"))


def test_what_is_no_model_is_refused(small, tokenizer, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="cannot read a model from .*bad.gguf: "):
        convert(tmp_path / "bad.gguf", tmp_path / "folder")
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    gone = "model.layers.1.mlp.up_proj.weight"
    _write(tmp_path / "less.gguf", small, text, leave_out=(gone,))
    with pytest.raises(ModelError, match=f"lacks 1 of the weights .* {gone}"):
        convert(tmp_path / "less.gguf", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
