"""FLASH: its definition token by token, and all that a linearized model can do."""

from __future__ import annotations

import cmath
import math
import subprocess
import sys

import pytest
import torch
import transformers
from torch.nn import functional as F

import linearized
from linearized import FlashConfig, FlashForCausalLM
from linearized.cache import CACHE
from linearized.errors import ConfigError, ModelError, StateError
from linearized.flash.unit import previous
from linearized.models import linear_config

BOTH = pytest.mark.parametrize("augment", [True, False])


def flash(
    *, augment: bool = True, group: int = 8, dtype: torch.dtype = torch.float64, **settings
) -> FlashForCausalLM:
    """A tiny random model whose parameters are all of a size that matters."""
    torch.manual_seed(0)
    config = FlashConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, head_dim=16, group=group, taps=5,
        augment=augment, rotary=0.5, pad_token_id=0, bos_token_id=0, **settings,
    )  # fmt: skip
    model = FlashForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.3 * torch.randn_like(parameter)
            if name.endswith("scale"):  # so that local scores lie on both sides of Laplace's mean
                parameter *= torch.tensor([16, 16, 4, 4])[:, None]
    return model


def tokens_of(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 61, (batch, length), generator=generator)


def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return gain * x / torch.sqrt((x * x).sum() / len(x) + 1e-5)


def rotated(x: torch.Tensor, position: int, width: int) -> torch.Tensor:
    """Channel pairs (i, i + width/2) as complex numbers, turned by position · 10000^(-2i/width)."""
    half = width // 2
    angles = [position * 10000 ** (-2 * i / width) for i in range(half)]
    turned = torch.complex(x[:half], x[half:width])
    turned = turned * torch.tensor([cmath.exp(1j * a) for a in angles], dtype=turned.dtype)
    return torch.cat([turned.real, turned.imag, x[width:]])


def laplace(x: float) -> float:
    """The distribution function of a normal variable of mean √½ and variance 1/4π."""
    return (1 + math.erf((x - math.sqrt(1 / 2)) / math.sqrt(2 / (4 * math.pi)))) / 2


def defined(model: FlashForCausalLM, tokens: list[int]) -> torch.Tensor:
    """Logits [T, V], pair by pair from the formulas."""
    config, w = model.config, model.state_dict()
    group, width, inner = config.group, config.head_dim, config.expansion * config.hidden_size
    hidden = [w["model.embed_tokens.weight"][token] for token in tokens]
    for layer in range(config.num_hidden_layers):
        p = {n.removeprefix(f"model.layers.{layer}."): t for n, t in w.items()}
        normed = [norm(h, p["norm.gain"]) for h in hidden]
        gates, values, heads = [], [], []
        for t, x in enumerate(normed):
            half = config.hidden_size // 2
            before = normed[t - 1][:half] if t else torch.zeros(half).double()
            x = p["in_proj.weight"] @ torch.cat([before, x[half:]]) + p["in_proj.bias"]
            x = x * torch.sigmoid(x)
            gates.append(x[:inner])
            values.append(x[inner : 2 * inner])
            of_head = [x[2 * inner :] * p["scale"][i] + p["offset"][i] for i in range(4)]
            heads.append([rotated(head, t, round(width * config.rotary)) for head in of_head])
        for t in range(len(tokens)):
            out = torch.zeros(inner).double()
            start = t // group * group
            for j in range(t + 1):
                if j >= start:
                    score = float(heads[t][0] @ heads[j][1]) / group
                    weight = laplace(score)
                else:
                    weight = float(heads[t][2] @ heads[j][3]) / start
                out += weight * values[j]
                if config.augment and t - j < config.taps:
                    out += p["linear_attention.taps"][0, t - j] * values[j]
            update = p["out_proj.weight"] @ (gates[t] * out) + p["out_proj.bias"]
            hidden[t] = hidden[t] + update
    final = [norm(h, w["model.norm.gain"]) for h in hidden]
    return torch.stack([w["lm_head.weight"] @ h for h in final])


@BOTH
def test_forward_is_the_definition(augment):
    model = flash(augment=augment)
    tokens = tokens_of(1, 29)
    with torch.no_grad():
        logits = model(tokens).logits[0]
    want = defined(model, tokens[0].tolist())
    assert (logits - want).abs().max() < 1e-10
    assert want.std() > 0.1


@BOTH
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 64, 100])
def test_forward_is_extend_is_chunks_is_one_by_one(augment, length):
    model = flash(augment=augment)
    tokens = tokens_of(2, length)
    with torch.no_grad():
        whole = model(tokens).logits
    ends = []
    for size in (length, 37, 5, 1):
        state = linearized.new_state(model, batch_size=2)
        parts = [linearized.extend(model, part, state) for part in tokens.split(size, dim=1)]
        assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-10
        assert state.length.tolist() == [length, length]
        ends.append(state)
    for other in ends[1:]:
        assert same(ends[0], other)


def same(one: linearized.DecodeState, other: linearized.DecodeState, atol: float = 1e-10) -> bool:
    mine, theirs = (s.layers.tensors() | {"shift": s.shift} for s in (one, other))
    return all(torch.allclose(mine[name], theirs[name], rtol=0, atol=atol) for name in mine)


@BOTH
@pytest.mark.parametrize("before", [0, 1, 5, 8, 14, 15])
def test_verify_is_extend_along_every_path_and_writes_nothing(augment, before):
    model = flash(augment=augment)
    state = linearized.new_state(model, batch_size=2)
    if before:
        linearized.extend(model, tokens_of(2, before), state)
    kept = state.clone()
    parents = torch.tensor([[-1, 0, 0, 1, 3, 4, 5, 6, 7, 2], [-1, -1, 1, 2, 3, 3, 5, 6, 7, 8]])
    tree = tokens_of(2, 10, seed=1)
    logits, pending = linearized.verify(model, tree, parents, state)
    assert same(state, kept, atol=0)
    for row in range(2):
        for node in range(10):
            path = [node]
            while (parent := int(parents[row, path[0]])) >= 0:
                path.insert(0, parent)
            alone = kept.select([row])
            want = linearized.extend(model, tree[row : row + 1, path], alone)
            assert (want[0, -1] - logits[row, node]).abs().max() < 1e-10
            committed = kept.clone()
            paths: list[list[int]] = [[], []]
            paths[row] = path
            linearized.commit(committed, pending, paths)
            assert same(committed.select([row]), alone)
            assert same(committed.select([1 - row]), kept.select([1 - row]), atol=0)


def test_rows_of_a_batch_may_differ_in_length():
    model = flash()
    state = linearized.new_state(model, batch_size=3)
    alone = [linearized.new_state(model) for _ in range(3)]
    for seed, kept in enumerate([(19, 30, 0), (1, 0, 11), (5, 40, 3)]):
        tokens = tokens_of(3, 40, seed)
        mask = torch.arange(40) >= 40 - torch.tensor(kept)[:, None]
        mask[1] = mask[1].flip(0)
        logits = linearized.extend(model, tokens, state, mask=mask)
        assert torch.isfinite(logits).all()
        for row in range(3):
            if kept[row]:
                want = linearized.extend(model, tokens[row : row + 1, mask[row]], alone[row])
                assert (want[0] - logits[row, mask[row]]).abs().max() < 1e-10
            assert same(alone[row], state.select([row]))


@BOTH
def test_padding_in_a_plain_forward(augment):
    model = flash(augment=augment)
    tokens = tokens_of(3, 30)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    mask[1, 25:] = 0
    mask[2, 11:17] = 0
    logits = model(tokens, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    for row in range(3):
        alone = model(tokens[row : row + 1, mask[row].bool()]).logits
        assert (alone[0] - logits[row, mask[row].bool()]).abs().max() < 1e-10
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@BOTH
def test_packed_documents_are_each_alone(augment):
    model = flash(augment=augment)
    tokens = tokens_of(2, 60)
    lengths = [[5, 1, 30, 24], [16, 8, 17, 19]]
    segments = torch.stack(
        [torch.repeat_interleave(torch.arange(4), torch.tensor(row)) for row in lengths]
    )
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    mask[1, 16:19] = 0
    for padding in (None, mask):
        with torch.no_grad():
            logits = model(tokens, segment_ids=segments, attention_mask=padding).logits
        for row in range(2):
            for document in range(4):
                here = segments[row] == document
                if padding is not None:
                    here &= padding[row].bool()
                alone = model(tokens[row : row + 1, here]).logits
                assert (alone[0] - logits[row, here]).abs().max() < 1e-10


def test_the_future_leaves_the_past_alone():
    model = flash()
    tokens = tokens_of(1, 40)
    with torch.no_grad():
        whole = model(tokens).logits
        for t in (0, 7, 8, 23, 38):
            changed = tokens.clone()
            changed[:, t + 1 :] = tokens[:, t + 1 :] % 60 + 1
            logits = model(changed).logits
            assert (logits[:, : t + 1] - whole[:, : t + 1]).abs().max() < 1e-12
            assert (logits[:, t + 1] - whole[:, t + 1]).abs().max() > 1e-6


def test_the_token_before():
    x = torch.arange(1.0, 13.0).view(2, 6, 1)
    assert previous(x)[..., 0].tolist() == [[0, 1, 2, 3, 4, 5], [0, 7, 8, 9, 10, 11]]
    last = torch.tensor([[-1.0], [-2.0]])
    mask = torch.tensor([[0, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 1]])
    before = previous(x, last, mask=mask)[..., 0]
    assert before[mask.bool()].tolist() == [-1, 2, 5, -2, 7, 8, 9]
    segments = torch.tensor([[0, 0, 0, 1, 1, 2], [5, 5, 5, 5, 5, 3]])
    assert previous(x, segments=segments)[..., 0].tolist() == [
        [0, 1, 2, 0, 4, 0], [0, 7, 8, 9, 10, 0],
    ]  # fmt: skip


def test_saved_and_loaded_by_transformers_in_a_new_process(tmp_path):
    model = flash(dtype=torch.float32)
    tokens = tokens_of(1, 40)
    want = model(tokens).logits
    model.save_pretrained(tmp_path / "model")
    torch.save(tokens, tmp_path / "tokens.pt")
    script = f"""
import torch, transformers, linearized
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
assert type(model) is linearized.FlashForCausalLM
assert model.lm_head.weight is model.model.embed_tokens.weight
tokens = torch.load({str(tmp_path / "tokens.pt")!r})
torch.save(model(tokens).logits, {str(tmp_path / "logits.pt")!r})
print(linearized.fingerprint(model))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), want)
    assert done.stdout.strip() == linearized.fingerprint(model)
    loaded = linearized.load(tmp_path / "model")
    assert linearized.fingerprint(loaded) == linearized.fingerprint(model)
    assert loaded.config.to_dict() | {"dtype": None, "_name_or_path": ""} == (
        model.config.to_dict() | {"dtype": None, "_name_or_path": ""}
    )


@BOTH
def test_generate_of_both_kinds(augment):
    model = flash(augment=augment)
    tokens = tokens_of(2, 20)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    out = model.generate(tokens, attention_mask=mask, **settings)
    for row, first in ((0, 7), (1, 0)):
        prompt = tokens[row, first:]
        plain = linearized.generate(model, prompt.tolist(), max_new_tokens=30)
        assert out[row, 20:].tolist() == plain
        for drafter in ("ngram", model):
            told = linearized.generate(model, prompt.tolist(), max_new_tokens=30, drafter=drafter)
            assert told == plain
        logits = model(torch.cat([prompt, torch.tensor(plain)])[None]).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == plain
    beams = model.generate(tokens[:1], num_beams=3, **settings)
    assert beams.shape == (1, 50)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_decoding_by_hand_with_the_cache_of_transformers(name):
    """By its name of today and by that before 5.24."""
    model = flash()
    tokens = tokens_of(2, 21)
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :20], use_cache=True)
        second = model(tokens[:, 20:], **{name: first[CACHE]})
    assert (torch.cat([first.logits, second.logits], dim=1) - whole).abs().max() < 1e-10
    with pytest.raises(ModelError, match="no gradient"):
        model(tokens[:, 20:], **{name: second[CACHE]})


@BOTH
def test_gradients_are_finite_and_training_learns(augment):
    model = flash(augment=augment, dtype=torch.float32)
    model.apply(model._init_weights)
    model.train()
    tokens = tokens_of(4, 33)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.5
    assert losses[-1] < 0.3


def test_gradients_are_those_of_finite_differences():
    model = flash(group=4)
    tokens = tokens_of(1, 11)

    def loss() -> torch.Tensor:  # that of transformers is float32
        return F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:])

    loss().backward()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        ends = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                parameter += step * direction
                ends.append(loss().item())
        with torch.no_grad():
            parameter += 1e-6 * direction
        slope = float((parameter.grad * direction).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-7), name


def test_checkpointed_gradients_are_the_same():
    model = flash()
    tokens = tokens_of(2, 20)
    grads = []
    for _ in range(2):
        model.train().zero_grad()
        model(tokens, labels=tokens).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.activation_checkpointing_enable({"use_reentrant": False})
    assert all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))


@BOTH
def test_state_bytes_are_constant_and_go_round(augment):
    model = flash(augment=augment, dtype=torch.float32)
    state = linearized.new_state(model, batch_size=2)
    empty = state.nbytes
    assert state.shift is not None and state.shift.shape == (2, 2, 16)
    sizes = []
    for length in (30, 2970):
        for part in tokens_of(2, length).split(1000, dim=1):
            linearized.extend(model, part, state, logits_to_keep=1)
        sizes.append((state.nbytes, len(state.to_bytes())))
    assert sizes[0] == sizes[1] == (empty, sizes[0][1])
    back = linearized.DecodeState.from_bytes(state.to_bytes())
    assert same(back, state, atol=0)
    back.check(linearized.fingerprint(model))
    other = linearized.new_state(model, batch_size=2)
    other.copy_(back)
    tokens = tokens_of(2, 5, seed=3)
    want = linearized.extend(model, tokens, state)
    assert torch.equal(want, linearized.extend(model, tokens, back))
    assert torch.equal(want, linearized.extend(model, tokens, other))


def test_hidden_states_and_embeddings_in():
    model = flash()
    tokens = tokens_of(1, 9)
    out = model(inputs_embeds=model.get_input_embeddings()(tokens), output_hidden_states=True)
    assert torch.equal(out.logits, model(tokens).logits)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.allclose(model(tokens, logits_to_keep=2).logits, out.logits[:, -2:])
    assert isinstance(model(tokens, return_dict=False), tuple)


def test_the_defaults_are_the_base_model_of_the_paper():
    with torch.device("meta"):
        model = FlashForCausalLM(FlashConfig())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(110e6, rel=0.05)
    unit = model.model.layers[0]
    assert unit.linear_attention.taps.shape == (1, 32)
    assert unit.linear_attention.form.group == 256
    assert unit.linear_attention.form.features == 128


def test_errors_name_the_value(llama):
    model = flash()
    assert linear_config(model).attention == "flash"
    assert linear_config(model).group == 8
    with pytest.raises(ModelError, match="linearized already"):
        linearized.linearize(model, linearized.LinearConfig(attention="grouped"))
    with pytest.raises(ModelError, match="cannot become FLASH"):
        linearized.linearize(llama(), linearized.LinearConfig(attention="flash"))
    with pytest.raises(ConfigError, match="hidden_size must be even.*33"):
        FlashConfig(hidden_size=33)
    with pytest.raises(ConfigError, match="group must be at least 1, got 0"):
        FlashConfig(group=0)
    with pytest.raises(ConfigError, match="rotary.*1.5"):
        FlashConfig(rotary=1.5)
    with pytest.raises(ModelError, match="either input_ids or inputs_embeds"):
        model()
    state = linearized.new_state(model)
    with pytest.raises(StateError, match="belongs to model"):
        linearized.extend(flash(augment=False), tokens_of(1, 3), state)
    assert isinstance(model, transformers.PreTrainedModel)
