"""Every variant in every family of models: decoding, padding, packing, hybrids, files, refusals."""

from __future__ import annotations

import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
import transformers
from torch import Tensor

import linearized
from linearized.config import ATTENTIONS
from linearized.errors import ConfigError, ModelError, StateError
from linearized.models import new_parameters

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
GEMMA2 = {
    "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8,
    "layer_types": ["full_attention"] * 2, "attn_logit_softcapping": 5.0,
}  # fmt: skip
FAMILIES = {
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 2}),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 8}),
    "mistral": (transformers.MistralConfig, {"num_key_value_heads": 1, "sliding_window": None}),
    "gemma": (transformers.GemmaConfig, {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma2": (transformers.Gemma2Config, GEMMA2),
    "gpt2": (
        transformers.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    ),
    "opt": (transformers.OPTConfig, {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt_neox": (transformers.GPTNeoXConfig, {}),
}  # fmt: skip
SMALL = {"group": 8, "taps": 5, "features": 12, "hashes": 4, "bits": 3, "period": 11}
T5 = {
    "vocab_size": 61, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4,
    "num_decoder_layers": 3, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def causal(family: str = "llama", **settings):
    """A random softmax model, float64."""
    config, own = FAMILIES[family]
    torch.manual_seed(0)
    made = config(**{**SIZES, **own, **settings})
    model = transformers.AutoModelForCausalLM.from_config(made).double().eval()
    model.generation_config.eos_token_id = None
    return model


def linear(model, attention: str = "grouped", **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of soft caps; a test of its own
        linearized.linearize(
            model, linearized.LinearConfig(attention=attention, **{**SMALL, **settings})
        )
    for parameter in new_parameters(model):
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def tokens_of(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 61, (batch, length), generator=generator)


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() < tolerance


@torch.no_grad()
def decoded(model, tokens: Tensor, size: int) -> Tensor:
    state = linearized.new_state(model, batch_size=len(tokens))
    parts = [linearized.extend(model, part, state) for part in tokens.split(size, dim=1)]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def assert_laws(model) -> None:
    """Prefill = chunks = one by one; a tree = its paths; padding and packing change nothing;
    speculation and transformers' `generate` give the plain text."""
    tokens = tokens_of(2, 30)
    whole = model(input_ids=tokens, use_cache=False).logits
    for size in (30, 7, 1):
        assert_close(decoded(model, tokens, size), whole)

    state = linearized.new_state(model, batch_size=2)
    linearized.extend(model, tokens[:, :13], state)
    before = state.clone()
    parents = torch.tensor([[-1, 0, 0, 1, 3, 4, 2], [-1, -1, 1, 2, 3, 3, 5]])
    tree = tokens_of(2, 7, seed=1)
    logits, pending = linearized.verify(model, tree, parents, state)
    for row, path in ((0, [0, 1, 3, 4, 5]), (1, [1, 2, 3, 5, 6])):
        alone = before.select([row])
        want = linearized.extend(model, tree[row : row + 1, path], alone)
        assert_close(logits[row : row + 1, path], want)
        committed = before.clone()
        linearized.commit(committed, pending, [path if r == row else [] for r in range(2)])
        follow = tokens_of(1, 9, seed=2)
        assert_close(
            linearized.extend(model, follow, committed.select([row])),
            linearized.extend(model, follow, alone),
        )

    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    mask[1, 25:] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
    assert_close(padded[:1, 7:], model(input_ids=tokens[:1, 7:], use_cache=False).logits)
    assert_close(padded[1:, :25], model(input_ids=tokens[1:, :25], use_cache=False).logits)

    segments = torch.tensor([[0] * 9 + [1] * 13 + [2] * 8, [5] * 20 + [3] * 10])
    packed = model(input_ids=tokens, segment_ids=segments, use_cache=False).logits
    assert_close(packed[:1, 9:22], model(input_ids=tokens[:1, 9:22], use_cache=False).logits)
    assert_close(packed[1:, 20:], model(input_ids=tokens[1:, 20:], use_cache=False).logits)

    prompts = [tokens[0, 7:20].tolist(), tokens[1, :20].tolist()]
    plain = linearized.generate(model, prompts, max_new_tokens=12)
    assert linearized.generate(model, prompts, max_new_tokens=12, drafter=model) == plain
    out = model.generate(
        tokens[:, :20], attention_mask=mask[:, :20], max_new_tokens=12, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    assert out[:, 20:].tolist() == plain


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_variants(attention, augment):
    assert_laws(linear(causal(), attention, augment=augment))


WINDOWS = [
    {"attention": "local", "group": 3, "window": 3, "sinks": 0},
    {"attention": "grouped", "group": 4, "window": 2, "sinks": 4},
    {"attention": "hedgehog", "group": 3, "window": 1, "sinks": 2, "bound": 4.0},
    {"attention": "hedgehog", "group": 1, "window": 1, "sinks": 1, "augment": False},
]
"""Some groups are shorter than the convolution, some are all sinks."""


@pytest.mark.parametrize("family, layers", [("llama", None), ("llama", [0]), ("gpt2", [1])])
@pytest.mark.parametrize("settings", WINDOWS, ids=str)
def test_windows(family, layers, settings):
    assert_laws(linear(causal(family), layers=layers, **settings))


@pytest.mark.parametrize("attention", ["grouped", "performer", "hedgehog"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, attention):
    assert_laws(linear(causal(family), attention))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("attention", ["grouped", "linformer"])
def test_hybrids(attention, family):
    own = {"gpt2": {"n_layer": 3}, "gemma2": {"layer_types": ["full_attention"] * 3}}
    softmax = causal(family, num_hidden_layers=3, **own.get(family, {}))
    assert_laws(linear(softmax, attention, layers=[0, 2]))


def test_a_hybrid_of_no_linear_difference_is_the_softmax_model():
    """What its softmax layers compute is what transformers computes: a model whose one linearized
    layer adds nothing equals the same model with that layer's attention cut out."""
    softmax = causal(num_hidden_layers=3)
    tokens = tokens_of(2, 40)
    model = linear(causal(num_hidden_layers=3), layers=[1])
    for each in (softmax, model):
        each.model.layers[1].self_attn.o_proj.weight.data.zero_()
    with torch.no_grad():
        want = softmax(input_ids=tokens, use_cache=False).logits
        assert_close(model(input_ids=tokens, use_cache=False).logits, want)
    assert_close(decoded(model, tokens, 9), want)


def test_sliding_layers_of_a_hybrid_keep_their_window():
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
    softmax = causal("gemma2", **kinds)
    model = linear(causal("gemma2", **kinds), layers=[1])
    tokens = tokens_of(2, 40)
    for each in (softmax, model):
        each.model.layers[1].self_attn.o_proj.weight.data.zero_()
    softmax.set_attn_implementation("eager")  # sdpa knows no soft cap
    with torch.no_grad():
        want = softmax(input_ids=tokens, use_cache=False).logits
        assert_close(model(input_ids=tokens, use_cache=False).logits, want, 1e-5)
    assert_close(decoded(model, tokens, 9), want, 1e-5)
    assert_laws(model)


def test_the_state_of_a_hybrid_says_that_it_grows():
    hybrid, whole = linear(causal(), layers=[0]), linear(causal())
    sizes = {}
    for name, model in (("hybrid", hybrid), ("whole", whole)):
        state = linearized.new_state(model)
        sizes[name] = [state.nbytes]
        for length in (100, 400):
            linearized.extend(model, tokens_of(1, length), state)
            sizes[name].append(state.nbytes)
        again = linearized.DecodeState.from_bytes(state.to_bytes())
        assert again.shapes() == state.shapes()
        assert again.nbytes <= state.nbytes, "no room for tokens that are not there"
        follow = tokens_of(1, 5)
        assert_close(
            linearized.extend(model, follow, again), linearized.extend(model, follow, state)
        )
    assert sizes["hybrid"][0] < sizes["hybrid"][1] < sizes["hybrid"][2]
    assert len(set(sizes["whole"])) == 1


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bert_reads_in_both_directions(attention):
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SIZES, "max_position_embeddings": 128})
    model = linear(transformers.BertForMaskedLM(config).double().eval(), attention)
    tokens = tokens_of(2, 30)
    mask = torch.ones_like(tokens)
    mask[1, 25:] = 0
    logits = model(input_ids=tokens, attention_mask=mask).logits
    assert_close(logits[1:, :25], model(input_ids=tokens[1:, :25]).logits)
    segments = torch.tensor([[0] * 9 + [1] * 13 + [2] * 8] * 2)
    packed = model(input_ids=tokens, segment_ids=segments).logits
    assert_close(packed[:, 9:22], model(input_ids=tokens[:, 9:22]).logits)
    changed = tokens.clone()
    changed[:, 7] = 1
    assert not torch.allclose(model(input_ids=changed).logits[:, 0], logits[:, 0])  # one group
    logits.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in new_parameters(model))
    with pytest.raises(ModelError, match="both directions"):
        linearized.new_state(model)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_t5_attends_across(attention, tmp_path):
    torch.manual_seed(0)
    made = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).double().eval()
    model = linear(made, attention)
    model.generation_config.eos_token_id = None
    source, target = tokens_of(2, 37), tokens_of(2, 19, seed=1)
    mask = torch.ones_like(source)
    mask[1, 20:] = 0
    given = {"decoder_input_ids": target, "use_cache": False}
    logits = model(input_ids=source, attention_mask=mask, **given).logits
    given["decoder_input_ids"] = target[1:]
    assert_close(logits[1:], model(input_ids=source[1:, :20], **given).logits)
    for size in (19, 5, 1):
        state = linearized.encode(model, source, mask)
        parts = [linearized.extend(model, part, state) for part in target.split(size, dim=1)]
        assert_close(torch.cat(parts, dim=1), logits)
    assert state.nbytes == linearized.encode(model, source[:, :5]).nbytes
    assert linearized.DecodeState.from_bytes(state.to_bytes()).nbytes == state.nbytes
    before = state.clone()
    tree = torch.tensor([[-1, -1], [-1, 0]])
    nodes, pending = linearized.verify(model, target[:, :2], tree, state)
    assert_close(nodes[1:], linearized.extend(model, target[1:, :2], before.select([1])))
    linearized.commit(state, pending, [[1], [0, 1]])
    assert state.length.tolist() == [20, 21]
    logits.square().sum().backward()
    unused = "relative_attention_bias"
    for name, parameter in model.named_parameters():
        assert unused in name or torch.isfinite(parameter.grad).all()

    text = torch.zeros(2, 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(12):
            out = model(
                input_ids=source, attention_mask=mask, decoder_input_ids=text, use_cache=False
            )
            text = torch.cat([text, out.logits[:, -1:].argmax(-1)], dim=1)
    spoken = model.generate(source, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(spoken, text)
    model.save_pretrained(tmp_path)
    loaded = linearized.load(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(model)
    with torch.no_grad():
        again = loaded(input_ids=source, attention_mask=mask, decoder_input_ids=target)
    assert_close(again.logits, logits.detach(), 1e-5)


@pytest.mark.parametrize("settings", [{"attention": name} for name in ATTENTIONS] + [
    {"attention": "grouped", "layers": [1]}, {"attention": "rfa", "augment": False},
])  # fmt: skip
def test_saved_and_loaded(settings, tmp_path):
    """Random features and hashes come back from the file, not from the seed."""
    model = linear(causal(), **settings)
    for buffer in model.buffers():
        if buffer.shape and buffer.is_floating_point() and buffer.ndim > 1:
            buffer.mul_(1.5)
    tokens = tokens_of(1, 40)
    with torch.no_grad():
        want = model(input_ids=tokens, use_cache=False).logits
    model.save_pretrained(tmp_path)
    loaded = linearized.load(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        assert_close(loaded(input_ids=tokens, use_cache=False).logits, want, 1e-5)
    assert linearized.models.linear_config(loaded) == linearized.models.linear_config(model)


def test_transformers_alone_opens_every_kind(tmp_path):
    """In one new process, after nothing but `import linearized`."""
    for name in ATTENTIONS:
        linear(causal(), name).float().save_pretrained(tmp_path / name)
    script = f"""
import pathlib, torch, transformers, linearized
for folder in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    print(folder.name, linearized.fingerprint(model))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split() for line in done.stdout.splitlines())
    assert lines == {
        name: linearized.fingerprint(linearized.load(tmp_path / name)) for name in ATTENTIONS
    }


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_parameter_learns(attention):
    model = linear(causal(), attention).train()
    tokens = tokens_of(2, 40)
    model(input_ids=tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.norm() > 0, name


def test_a_state_of_another_model_is_refused():
    model, other = linear(causal()), linear(causal())
    state = linearized.new_state(model)
    linearized.extend(other, tokens_of(1, 3), linearized.new_state(other))
    torch.nn.init.normal_(new_parameters(other)[0])
    with pytest.raises(StateError, match="belongs to model"):
        linearized.extend(other, tokens_of(1, 3), state)
    with pytest.raises(StateError, match="belongs to model"):
        linearized.verify(other, tokens_of(1, 1), torch.tensor([[-1]]), state)


def test_what_is_lost_is_said():
    with pytest.warns(UserWarning, match=r"caps its attention scores at 5\.0"):
        config = linearized.LinearConfig(attention="grouped")
        linearized.linearize(causal("gemma2"), config)
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    with pytest.warns(UserWarning, match="relative position bias"):
        linearized.linearize(t5, config)


def test_what_cannot_be_linearized_says_why():
    config = linearized.LinearConfig(attention="grouped")
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
    with pytest.raises(ModelError, match=r"layers 0 of.*sliding window.*layers=\[1\]"):
        linearized.linearize(causal("gemma2", **kinds), config)
    with pytest.raises(ModelError, match="layers 0, 1 of.*sliding window.*no other"):
        linearized.linearize(causal("mistral", sliding_window=7), config)
    with pytest.raises(ModelError, match="layers 0 to 1, there is no layer 2, 5"):
        linearized.linearize(causal(), linearized.LinearConfig(attention="relu", layers=[0, 2, 5]))
    with pytest.raises(ModelError, match="linearize all"):
        t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
        linearized.linearize(t5, linearized.LinearConfig(attention="relu", layers=[0]))
    bloom = transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(ModelError, match="AttentionInterface"):
        linearized.linearize(transformers.BloomForCausalLM(bloom), config)
    with pytest.raises(ModelError, match="model.generate"):
        small = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
        linearized.generate(linear(small), [3, 4], max_new_tokens=1)
    with pytest.raises(ModelError, match="no encoder"):
        linearized.encode(linear(causal()), tokens_of(1, 5))


@pytest.mark.parametrize("settings", [
    {"attention": "grouped", "window": 1}, {"attention": "local", "sinks": 2},
    {"attention": "hedgehog", "bound": 4.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_window_is_for_models_that_read_one_way(family, settings):
    """The model is as it was afterwards."""
    if family == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()
    else:
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).eval()
    before, names = model.config.to_dict(), [name for name, _ in model.named_modules()]
    inputs = {"input_ids": tokens_of(1, 9)}
    if family == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    want = model(**inputs).logits
    with pytest.warns(UserWarning) if family == "t5" else nullcontext():
        [[name, value]] = (pair for pair in settings.items() if pair[0] != "attention")
        with pytest.raises(ConfigError, match=f"{name}={value}.*both directions"):
            linearized.linearize(model, linearized.LinearConfig(**settings))
    assert model.config.to_dict() == before
    assert [name for name, _ in model.named_modules()] == names
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("layers", [None, (1,)], ids=["all layers", "hybrid"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_autocast(attention, layers):
    """bfloat16 around the attention, float32 in it: as before but for bfloat16's digits."""
    model = linear(causal().float(), attention, augment=True, layers=layers)
    tokens = tokens_of(2, 21)
    want = model(input_ids=tokens, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens, use_cache=False).logits
        state = linearized.new_state(model, batch_size=2)
        linearized.extend(model, tokens[:, :13], state)
        nodes, pending = linearized.verify(
            model, tokens[:, 13:16], torch.tensor([[-1, 0, 1]]).expand(2, -1), state
        )
        linearized.commit(state, pending, [[0, 1, 2]] * 2)
        rest = linearized.extend(model, tokens[:, 16:], state)
    assert logits.dtype == torch.bfloat16
    limit = 0.08 * want.abs().max()
    if attention != "yoso":  # a hash falls to the other side for the smallest difference
        assert 0 < (logits - want).abs().max() < limit
        assert (nodes - want[:, 13:16]).abs().max() < limit
        assert (rest - want[:, 16:]).abs().max() < limit
    logits.float().logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert state.layers.memory.dtype == torch.float32
