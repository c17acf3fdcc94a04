"""What benchmarks measure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import linearized
from linearized.medusa import MedusaHeads
from linearized.training.blocks import Document, fill, write_shard
from linearized.training.tokenizer import fingerprint


@pytest.fixture(scope="session")
def pair(tokenizer, tmp_path_factory) -> Path:
    """All that benchmarks measure, with random weights."""
    run = tmp_path_factory.mktemp("pair")
    for name, layers, linear in (
        ("teacher", 3, False), ("target", 3, True), ("draft", 1, True), ("softmax_draft", 1, False),
        ("pruned", 2, True),
    ):  # fmt: skip
        torch.manual_seed(layers)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
            num_hidden_layers=layers, num_attention_heads=2, initializer_range=0.2,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        if linear:
            linearized.linearize(model, linearized.LinearConfig(attention="grouped", group=8))
        model.save_pretrained(run / name)
        tokenizer.save_pretrained(run / name)
    target = linearized.load(run / "target")
    heads = MedusaHeads.on(target, 2, linearized.fingerprint(target))
    heads.save_pretrained(run / "target" / "medusa")
    layers = {"format": "linearized-layers/1", "layers": [0, 2]}
    (run / "target" / "layers.json").write_text(json.dumps(layers))
    filled = fill([Document(np.arange(3200, dtype=np.int32) % len(tokenizer))], block=96)
    (run / "data" / "held_out").mkdir(parents=True)
    write_shard(
        run / "data" / "held_out" / "0.arrow", filled, tokenizer=fingerprint(run / "target"),
        source="numbers", split="held_out",
    )  # fmt: skip
    return run
