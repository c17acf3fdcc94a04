"""What a replica needs, beside what it takes."""

from __future__ import annotations

import pytest
import torch

import linearized
from linearized.slots import attention_modules, heads_of
from serve_apps import memory
from serve_apps.memory import Needs, available
from serve_apps.weights import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
def test_needs_are_what_is_taken(folders, dtype):
    needs = Needs.of(str(folders["target"]), dtype=dtype, rows=3, max_context=100)
    model = linearized.load(folders["target"], dtype=DTYPES[dtype])
    assert needs.weights == sum(weight.nbytes for weight in model.parameters())
    assert needs.states == linearized.new_state(model, 3).nbytes


def test_layers_that_keep_softmax_need_more_for_longer_texts(linear, tmp_path):
    model = linear(dtype=torch.float32, linearize=(0,))
    model.save_pretrained(tmp_path)
    short, long = (
        Needs.of(str(tmp_path), dtype="float32", rows=2, max_context=tokens).states
        for tokens in (100, 10_000)
    )
    _, kv_heads, width = heads_of(attention_modules(model)[1], model.config)
    assert long - short >= 2 * 9_000 * 2 * kv_heads * width * 4


def test_a_container_has_less_than_its_machine(tmp_path, monkeypatch):
    limits = {"unlimited": "max\n", "small": "1000000\n"}
    for name, text in limits.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "unlimited", tmp_path / "nowhere"))
    machine = available("cpu")
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "small",))
    assert available("cpu") == 10**6 < machine
