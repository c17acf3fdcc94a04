"""Tiny models to serve: random, with a real tokenizer."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import linearized
from linearized.models import new_parameters
from serve_apps.metrics import Meter, Metric


def save_tiny(folder: Path, *, vocab: int, seed: int = 0, layers: int = 2) -> None:
    """A random linearized Llama whose texts do not just repeat one token."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    linearized.linearize(model, linearized.LinearConfig(attention="grouped", augment=True))
    for parameter in new_parameters(model):
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        model.lm_head.weight[0] = 0  # the end of text is never the best token
    model.save_pretrained(folder)


def save_padded(folder: Path, to: Path, *, more: int) -> None:
    """The same model and tokenizer, with more rows in its vocabulary. It likes them best."""
    shutil.copytree(folder, to)
    (weights,) = to.glob("*.safetensors")
    tensors = load_file(weights)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = torch.cat([tensors[name], 2 * tensors[name][1 : 1 + more]])
    save_file(tensors, weights, {"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    config["vocab_size"] += more
    (to / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """`target`; `draft`, the same model, so that its guesses are right; `padded`, the draft with a
    larger vocabulary; `wrong`, another one; `other`, one with another vocabulary."""
    root = tmp_path_factory.mktemp("models")
    seeds = {"target": 0, "draft": 0, "wrong": 1}
    for name, seed in seeds.items():
        save_tiny(root / name, vocab=len(tokenizer), seed=seed)
        tokenizer.save_pretrained(root / name)
    save_tiny(root / "other", vocab=100)
    save_padded(root / "draft", root / "padded", more=20)
    return {name: root / name for name in [*seeds, "other", "padded"]}


class Kept(Meter):
    """Remembers all numbers."""

    def __init__(self) -> None:
        self.counts: dict[tuple[Metric | str, ...], float] = defaultdict(float)
        self.gauges: dict[Metric, float] = {}
        self.values: dict[Metric, list[float]] = defaultdict(list)

    def add(self, metric: Metric, value: float = 1, **labels: str) -> None:
        assert metric.kind == "counter" and labels.keys() == set(metric.labels)
        self.counts[metric, *labels.values()] += value

    def set(self, metric: Metric, value: float) -> None:
        assert metric.kind == "gauge"
        self.gauges[metric] = value

    def observe(self, metric: Metric, value: float) -> None:
        assert metric.kind == "histogram"
        self.values[metric].append(value)


@pytest.fixture
def meter() -> Kept:
    return Kept()
