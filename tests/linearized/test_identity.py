"""A fingerprint tells models apart, notices what is written, and keeps nothing alive."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

import linearized
from linearized.errors import StateError
from linearized.identity import fingerprint


def write(parameter):
    with torch.no_grad():
        parameter.add_(1)


def replace_norm(model):
    norm = model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach() + 1)


def untie_head(model):
    head = model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone() + 1)


def load(model):
    model.load_state_dict({name: x + 1 for name, x in model.state_dict().items()})


class Adapted(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.more = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.base(x) * self.more


def adapt(model):
    attention = model.model.layers[0].self_attn
    attention.v_proj = Adapted(attention.v_proj)


def leave_out(model):
    del model.model.layers[1]


CHANGES = {
    "an adapter is put around a layer": adapt,
    "a layer is left out": leave_out,
    "a weight is written": lambda model: write(model.model.layers[1].mlp.up_proj.weight),
    "a weight is replaced": replace_norm,
    "the head gets weights of its own": untie_head,
    "weights are loaded": load,
    "the type changes": lambda model: model.to(torch.float32).to(torch.float64),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(linear, name):
    model = linear()
    before = fingerprint(model)
    assert fingerprint(model) == before
    CHANGES[name](model)
    assert fingerprint(model) != before


def test_a_write_through_data_is_noticed_by_the_next_state(linear):
    model = linear()
    state = linearized.new_state(model)
    model.model.layers[0].self_attn.q_proj.weight.data.add_(1)
    linearized.new_state(model)
    with pytest.raises(StateError, match="belongs to model"):
        linearized.extend(model, torch.tensor([[1]]), state)


def test_equal_models_have_equal_fingerprints(linear, tmp_path):
    model = linear()
    model.save_pretrained(tmp_path)
    loaded = linearized.load(tmp_path, dtype=torch.float64)
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) == fingerprint(loaded)


def test_every_weight_counts(linear):
    model = linear()
    seen = {fingerprint(model)}
    for parameter in model.parameters():
        write(parameter)
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(list(model.parameters()))


def test_it_keeps_no_weight_alive(linear):
    model = linear()
    fingerprint(model)
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(64, 32))
    gc.collect()
    assert weight() is None


def test_a_model_with_a_state_can_be_pickled(linear):
    model = linear()
    linearized.new_state(model)
    again = pickle.loads(pickle.dumps(model))
    assert fingerprint(again) == fingerprint(model)
