"""Linearized Hugging Face models: the verbs of decoding, saving, loading, refusing."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
import transformers

import linearized
from linearized.cache import CACHE
from linearized.errors import ConfigError, ModelError, StateError
from linearized.models import attention_modules, linear_config, new_parameters

LENGTHS = [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200]
NEAR = ["local", "grouped", "hedgehog"]
"""With a window, sinks and a bound."""


def tokens_of(model, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, model.config.vocab_size, (batch, length), generator=generator)


@pytest.mark.parametrize(
    "near, length",
    [*(("", length) for length in LENGTHS), *itertools.product(NEAR, [2, 64, 130, 195])],
)
def test_forward_is_extend_is_chunks_is_one_by_one(linear, near, length):
    model = linear(group=64, taps=32, near=near)
    tokens = tokens_of(model, 2, length)
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
    ends = []
    for size in (length, 48, 1):
        state = linearized.new_state(model, batch_size=2)
        parts = [linearized.extend(model, part, state) for part in tokens.split(size, dim=1)]
        assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-10
        assert state.length.tolist() == [length, length]
        ends.append(state)
    for name, tensor in ends[0].layers.tensors().items():
        for other in ends[1:]:
            assert torch.allclose(tensor, other.layers.tensors()[name], atol=1e-10)


@pytest.mark.parametrize(
    "near, offset", [*(("", offset) for offset in range(8)), *itertools.product(NEAR, [-7, 2, 7])]
)
def test_verify_is_extend_along_every_path_and_writes_nothing(linear, near, offset):
    model = linear(group=4 if near else 8, near=near)
    state = linearized.new_state(model, batch_size=2)
    linearized.extend(model, tokens_of(model, 2, 8 + offset), state)
    before = state.clone()
    parents = torch.tensor([[-1, 0, 0, 1, 3, 4, 5, 6, 7, 2], [-1, -1, 1, 2, 3, 3, 5, 6, 7, 8]])
    tree = tokens_of(model, 2, 10, seed=1)
    logits, pending = linearized.verify(model, tree, parents, state)
    for name, tensor in before.layers.tensors().items():
        assert torch.equal(tensor, state.layers.tensors()[name])
    for row in range(2):
        for node in range(10):
            path = [node]
            while (parent := int(parents[row, path[0]])) >= 0:
                path.insert(0, parent)
            alone = before.select([row])
            want = linearized.extend(model, tree[row : row + 1, path], alone)
            assert (want[0, -1] - logits[row, node]).abs().max() < 1e-10
            committed = before.clone()
            paths = [[], []]
            paths[row] = path
            linearized.commit(committed, pending, paths)
            for name, tensor in alone.layers.tensors().items():
                rows = committed.select([row]).layers.tensors()[name]
                assert torch.allclose(tensor, rows, atol=1e-10)
            other = committed.select([1 - row]).layers.tensors()
            for name, tensor in before.select([1 - row]).layers.tensors().items():
                assert torch.equal(tensor, other[name])


@pytest.mark.parametrize("near", ["", *NEAR])
def test_rows_of_a_batch_may_differ_in_length(linear, near):
    """One of them is shorter than the sinks, two turn the ring; then all go on, by one mask."""
    model = linear(group=8, near=near)
    tokens = tokens_of(model, 3, 30)
    mask = torch.ones_like(tokens)
    mask[0, :11] = 0
    mask[2, 2:] = 0
    parts = [slice(11, None), slice(0, None), slice(0, 2)]
    state = linearized.new_state(model, batch_size=3)
    logits = linearized.extend(model, tokens, state, mask=mask)
    assert state.length.tolist() == [19, 30, 2]
    assert torch.isfinite(logits).all()
    second = linearized.extend(model, tokens, state, mask=mask.flip(0))
    few = linearized.extend(model, tokens[:, :3], state)
    for row, part in enumerate(parts):
        alone = linearized.new_state(model)
        for found, kept in ((logits, part), (second, parts[2 - row]), (few, slice(0, 3))):
            want = linearized.extend(model, tokens[row : row + 1, kept], alone)
            assert (want[0] - found[row, kept]).abs().max() < 1e-10


@pytest.mark.parametrize("near", ["", *NEAR])
def test_padding_in_a_plain_forward(linear, near):
    """What transformers' users do: a padded batch with its attention mask."""
    model = linear(group=8, near=near)
    tokens = tokens_of(model, 2, 30)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    mask[1, 25:] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # rotary angles are float32 in transformers
    logits = model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
    assert torch.isfinite(logits).all()
    alone = model(input_ids=tokens[:1, 7:], use_cache=False).logits
    assert (alone[0] - logits[0, 7:]).abs().max() < 1e-10
    alone = model(input_ids=tokens[1:, :25], use_cache=False).logits
    assert (alone[0] - logits[1, :25]).abs().max() < 1e-10
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("near", ["", "hedgehog"])
def test_state_bytes_are_constant(linear, near):
    model = linear(dtype=torch.float32, group=64, taps=32, layers=1, near=near)
    state = linearized.new_state(model)
    sizes = []
    for length in (100, 9_900):
        for part in tokens_of(model, 1, length).split(2_000, dim=1):
            linearized.extend(model, part, state, logits_to_keep=1)
        sizes.append((state.nbytes, len(state.to_bytes())))
    assert state.length.tolist() == [10_000]
    assert sizes[0] == sizes[1]
    assert sizes[0][0] == linearized.new_state(model).nbytes


def test_logits_to_keep(linear):
    model = linear()
    tokens = tokens_of(model, 1, 20)
    all_of_them = linearized.extend(model, tokens, linearized.new_state(model))
    last = linearized.extend(model, tokens, linearized.new_state(model), logits_to_keep=1)
    assert last.shape == (1, 1, model.config.vocab_size)
    assert torch.allclose(last, all_of_them[:, -1:])


def test_a_new_swap_is_local_attention_until_it_is_trained(llama):
    """α and taps start at zero, whatever the variant's name; all other weights are kept."""
    teacher = llama().double()
    swapped = copy.deepcopy(teacher)
    linearized.linearize(swapped, linearized.LinearConfig(attention="grouped", group=8))
    local = copy.deepcopy(teacher)
    config = linearized.LinearConfig(attention="local", augment=False, group=8)
    linearized.linearize(local, config)
    tokens = tokens_of(teacher, 1, 40)
    a = swapped(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(a, local(input_ids=tokens, use_cache=False).logits)
    assert not torch.allclose(a, teacher(input_ids=tokens, use_cache=False).logits)
    kept = swapped.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())
    assert len(new_parameters(swapped)) == 2 * teacher.config.num_hidden_layers
    assert not new_parameters(local)


def test_saved_and_loaded_by_transformers_in_a_new_process(linear, tmp_path):
    model = linear(dtype=torch.float32)
    tokens = tokens_of(model, 1, 40)
    want = model(input_ids=tokens, use_cache=False).logits
    model.save_pretrained(tmp_path / "model")
    torch.save(tokens, tmp_path / "tokens.pt")
    script = f"""
import torch, transformers, linearized
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
tokens = torch.load({str(tmp_path / "tokens.pt")!r})
torch.save(model(input_ids=tokens, use_cache=False).logits, {str(tmp_path / "logits.pt")!r})
print(linearized.fingerprint(model))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), want)
    assert done.stdout.strip() == linearized.fingerprint(model)


@pytest.mark.parametrize("near", NEAR)
def test_a_window_is_saved_with_the_model(linear, near, tmp_path):
    """A state of one goes on in the other."""
    model = linear(dtype=torch.float32, near=near)
    tokens = tokens_of(model, 1, 30)
    model.save_pretrained(tmp_path)
    loaded = linearized.load(tmp_path)
    assert linear_config(loaded) == linear_config(model)
    state = linearized.new_state(model)
    linearized.extend(model, tokens, state)
    other = linearized.DecodeState.from_bytes(state.to_bytes())
    want = linearized.extend(model, tokens[:, :3], state)
    assert torch.equal(linearized.extend(loaded, tokens[:, :3], other), want)


def test_transformers_alone_refuses_a_linearized_folder(linear, tmp_path):
    """Without `import linearized` it must not come up as a softmax model."""
    linear(dtype=torch.float32).save_pretrained(tmp_path)
    script = f"""
import transformers
transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "linearized" in done.stderr


def test_a_folder_that_lost_weights_is_refused(linear, tmp_path):
    from safetensors.torch import load_file, save_file

    linear(dtype=torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: t for name, t in load_file(file).items() if "alpha" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="alpha"):
        linearized.load(tmp_path)


@pytest.mark.parametrize("near", ["", *NEAR])
def test_generate_of_transformers_works(linear, near):
    model = linear(group=8, near=near)
    model.generation_config.eos_token_id = None
    tokens = tokens_of(model, 2, 20)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0
    )
    for row, first in ((0, 7), (1, 0)):
        prompt = tokens[row, first:].tolist()
        want = linearized.generate(model, prompt, max_new_tokens=30)
        assert out[row, 20:].tolist() == want


SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
FAMILIES = {
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 8}),
    "mistral": (transformers.MistralConfig, {"num_key_value_heads": 1, "sliding_window": None}),
    "gemma": (transformers.GemmaConfig, {"num_key_value_heads": 2, "head_dim": 16}),
    "gpt2": (transformers.GPT2Config, GPT2),
    "opt": (transformers.OPTConfig, {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt_neox": (transformers.GPTNeoXConfig, {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    """Rotary and learned positions, grouped queries, heads that call their body in other ways."""
    config, settings = FAMILIES[family]
    torch.manual_seed(0)
    made = config(**{**SIZES, **settings}, initializer_range=0.2)
    model = transformers.AutoModelForCausalLM.from_config(made).double().eval()
    linearized.linearize(model, linearized.LinearConfig(attention="grouped", group=8, taps=5))
    for parameter in new_parameters(model):
        torch.nn.init.normal_(parameter)
    model.generation_config.eos_token_id = None
    tokens = tokens_of(model, 2, 30)
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
    state = linearized.new_state(model, batch_size=2)
    parts = [linearized.extend(model, part, state) for part in tokens.split(7, dim=1)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-9
    prompt = tokens[:1, :9]
    plain = linearized.generate(model, prompt[0].tolist(), max_new_tokens=20)
    spoken = linearized.generate(model, prompt[0].tolist(), max_new_tokens=20, drafter=model)
    assert spoken == plain
    out = model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert out[0, 9:].tolist() == plain
    model.save_pretrained(tmp_path)
    loaded = linearized.load(tmp_path, dtype=torch.float64)
    with torch.no_grad():  # transformers makes some constants in the dtype of the moment
        assert (loaded(input_ids=tokens, use_cache=False).logits - whole).abs().max() < 1e-5


def test_beam_search_of_transformers_works(linear):
    model = linear(group=8)
    model.generation_config.eos_token_id = None
    tokens = tokens_of(model, 1, 9)
    out = model.generate(tokens, max_new_tokens=12, num_beams=3, do_sample=False)

    @torch.no_grad()
    def score(text: torch.Tensor) -> float:
        logits = model(input_ids=text, use_cache=False).logits.log_softmax(-1)
        picked = logits[0, :-1].gather(1, text[0, 1:, None])
        return float(picked[8:].sum())

    greedy = tokens[0].tolist() + linearized.generate(model, tokens[0].tolist(), max_new_tokens=12)
    assert out.shape == (1, 21)
    assert score(out) >= score(torch.tensor([greedy])) - 1e-9


def test_a_failed_forward_leaves_the_state_whole(linear):
    model = linear(group=8)
    state = linearized.new_state(model)
    linearized.extend(model, tokens_of(model, 1, 10), state)
    before = state.clone()
    broken = attention_modules(model)[1].o_proj
    forward = broken.forward
    broken.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        linearized.extend(model, tokens_of(model, 1, 10), state)
    broken.forward = forward
    for name, tensor in before.layers.tensors().items():
        assert torch.equal(tensor, state.layers.tensors()[name])


def test_the_triton_backend_in_a_model(linear, tmp_path):
    """In a process of its own, where Triton's interpreter stands in for the GPU."""
    model = linear(dtype=torch.float32, group=8, layers=1)
    tokens = tokens_of(model, 2, 21)
    model.save_pretrained(tmp_path)
    torch.save((tokens, model(input_ids=tokens, use_cache=False).logits), tmp_path / "want.pt")
    script = f"""
import torch, linearized
model = linearized.load({str(tmp_path)!r})
linearized.set_backend(model, "triton")
tokens, want = torch.load({str(tmp_path / "want.pt")!r})
state = linearized.new_state(model, batch_size=2)
parts = [linearized.extend(model, part, state) for part in tokens.split(6, dim=1)]
with torch.no_grad():
    whole = model(input_ids=tokens, use_cache=False).logits
for logits in (whole, torch.cat(parts, dim=1)):
    assert (logits - want).abs().max() < 1e-4 * want.abs().max(), (logits - want).abs().max()
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(ConfigError, match="'cudnn'.*cpu, reference, triton"):
        linearized.set_backend(model, "cudnn")


@pytest.mark.parametrize("near", ["", *NEAR])
def test_training_with_the_defaults_of_transformers(linear, near):
    """Labels, and a cache that nobody asked for."""
    model = linear(group=8, near=near).train()
    tokens = tokens_of(model, 2, 20)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        whole = model.eval()(input_ids=tokens).logits
    assert torch.equal(whole, model(input_ids=tokens, use_cache=False).logits)


def test_errors_name_the_value(linear, llama, tmp_path):
    model = linear()
    config = linearized.LinearConfig(attention="grouped")
    with pytest.raises(ModelError, match="linearized already"):
        linearized.linearize(model, config)
    with pytest.raises(ModelError, match="not linearized"):
        linearized.new_state(llama())
    with pytest.raises(ModelError, match="nowhere"):
        linearized.load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="sliding"):
        settings = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64}
        mistral = transformers.Qwen2Config(
            **settings, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            use_sliding_window=True, max_window_layers=1, sliding_window=16,
        )  # fmt: skip
        linearized.linearize(transformers.Qwen2ForCausalLM(mistral), config)
    with pytest.raises(ConfigError, match="'groupd'.*grouped, hedgehog"):
        linearized.LinearConfig(attention="groupd")
    with pytest.raises(ConfigError, match="group must be.*0"):
        linearized.LinearConfig(attention="grouped", group=0)
    with pytest.raises(ConfigError, match="colour"):
        linearized.LinearConfig.from_dict({"attention": "grouped", "colour": 1})
    state = linearized.new_state(model)
    with pytest.raises(StateError, match="1 rows"):
        linearized.extend(model, tokens_of(model, 2, 5), state)
    cache = transformers.DynamicCache()
    cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    with torch.no_grad(), pytest.raises(ModelError, match="key/value cache"):
        model(input_ids=tokens_of(model, 1, 5), **{CACHE: cache})
    json.dumps(model.config.to_dict())


def test_decoding_by_hand_with_either_name_of_the_cache(linear):
    """Until 5.40 transformers takes the older one, too."""
    model = linear()
    tokens = tokens_of(model, 2, 21)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        whole = model(input_ids=tokens, use_cache=False).logits
        for name in {CACHE, "past_key_values"}:
            first = model(input_ids=tokens[:, :20], **{name: transformers.DynamicCache()})
            second = model(input_ids=tokens[:, 20:], **{name: first[CACHE]})
            both = torch.cat([first.logits, second.logits], dim=1)
            assert (both - whole).abs().max() < 1e-10, name
