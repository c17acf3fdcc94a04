"""Linearizing reaches one model: not its twins, nor those that share its config."""

from __future__ import annotations

import torch
import transformers

import linearized
from linearized.slots import NAME

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8}
CONFIG = linearized.LinearConfig(attention="grouped", group=8)


def test_two_models_of_one_config(llama):
    config = llama().config
    before = config.to_dict()
    teacher, student = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    tokens = torch.arange(3, 13)[None]
    want = teacher.generate(tokens, **GREEDY)
    linearized.linearize(student, CONFIG)
    assert torch.equal(teacher.generate(tokens, **GREEDY), want)
    assert config.to_dict() == before and config._attn_implementation == "sdpa"
    assert teacher.config is config and not hasattr(config, NAME)
    held = {id(m.config) for m in student.modules() if hasattr(m, "config")}
    assert held == {id(student.config)}  # one, as before, which is its own
    linearized.linearize(teacher, CONFIG)
    assert teacher.generate(tokens, **GREEDY).shape == want.shape
