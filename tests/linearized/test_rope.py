"""Angles depend on positions alone: neither neighbours nor drafts nor earlier texts change one."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import linearized
from linearized.errors import ModelError

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "initializer_range": 0.2,
}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
        "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
CASES = {"longrope": (LONG, 128), "longrope, short": (LONG, 32), "dynamic": (DYNAMIC, 32)}


def made(case: str, *, double: bool = True):
    rope, limit = CASES[case]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, rope_parameters=dict(rope), max_position_embeddings=limit
    )
    model = transformers.LlamaForCausalLM(config).eval()
    return model.double() if double else model


CONFIG = linearized.LinearConfig(attention="grouped", group=8)


@pytest.mark.parametrize("case", CASES)
def test_neighbours_and_drafts_change_nothing(case, tmp_path):
    softmax = made(case, double=False)
    before = softmax.config.to_dict()
    model = linearized.linearize(made(case, double=False), CONFIG)
    assert softmax.config.to_dict() == before
    text = list(range(3, 27))
    settings = {"max_new_tokens": 20, "stop_ids": []}
    alone = linearized.generate(model, text, **settings)
    assert linearized.generate(model, [text, list(range(3, 61))], **settings)[0] == alone
    assert linearized.generate(model, text, drafter=model, adaptive=False, **settings) == alone
    model.save_pretrained(tmp_path)
    loaded = linearized.load(tmp_path)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert linearized.generate(loaded, text, **settings) == alone


def test_which_angles():
    def angles(case: str) -> torch.Tensor:
        return linearized.linearize(made(case), CONFIG).model.rotary_emb.inv_freq

    plain = made("dynamic").model.rotary_emb.inv_freq
    assert torch.allclose(angles("dynamic"), plain)
    assert torch.allclose(angles("longrope, short"), plain)
    assert torch.allclose(angles("longrope"), plain / 3)


def test_a_kind_that_nobody_knows_how_to_fix_is_refused():
    model = made("dynamic")
    model.config.rope_parameters["alpha"] = 1000.0
    rotary, config = model.model.rotary_emb, model.config
    with pytest.raises(ModelError, match="'dynamic' with alpha"):
        linearized.linearize(model, CONFIG)
    assert model.model.rotary_emb is rotary and model.config is config


def test_folders_from_before_angles_were_fixed(tmp_path):
    model = linearized.linearize(made("longrope", double=False), CONFIG)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": LONG}))
    loaded = linearized.load(tmp_path)
    text, settings = list(range(3, 27)), {"max_new_tokens": 20, "stop_ids": []}
    want = linearized.generate(model, text, **settings)
    assert linearized.generate(loaded, text, **settings) == want
    rotary = loaded.model.rotary_emb
    assert torch.equal(rotary.inv_freq, model.model.rotary_emb.inv_freq)
    assert torch.equal(rotary.original_inv_freq, rotary.inv_freq)
