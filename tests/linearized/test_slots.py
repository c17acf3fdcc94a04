"""Every layer knows its place in the state, whichever of them are there."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import linearized
from linearized.models import shortened, sketch
from linearized.slots import Slot, attention_modules, modules_by_kind, slot_of


def hybrid_of(llama, layers):
    config = linearized.LinearConfig(attention="grouped", group=8, taps=5, layers=layers)
    model = linearized.linearize(llama(layers=4).double(), config)
    for parameter in linearized.models.new_parameters(model):
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("layers", [(), (0,), (1, 2), (0, 1, 2, 3)])
def test_slots_count_each_kind_from_0(llama, layers):
    model = hybrid_of(llama, layers)
    found = [slot_of(module) for module in attention_modules(model)]
    counts = {"linear": 0, "softmax": 0}
    for number, slot in enumerate(found):
        kind = "linear" if number in layers else "softmax"
        assert slot == Slot(kind, counts[kind])
        counts[kind] += 1
    for kind, count in counts.items():
        assert len(modules_by_kind(model, kind)) == count
    state = linearized.new_state(model)
    assert state.num_layers == counts["linear"]
    assert (state.history is None) == (not counts["softmax"])


@pytest.mark.parametrize("layers", [(), (0,), (1, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("kept", [(0, 3), (2,), (1, 2, 3)])
def test_a_model_with_layers_left_out_reads_their_own_states(llama, layers, kept):
    """Whose keys and values a layer reads shows once they differ: a twin whose other layers are
    gone and whose states are theirs says the same."""
    model = hybrid_of(llama, layers)
    tokens = torch.randint(1, 60, (2, 21))
    state = linearized.new_state(model, batch_size=2)
    linearized.extend(model, tokens, state)
    tree = tokens[:, :3], torch.tensor([[-1, 0, 0]] * 2)
    got = sketch(model, *tree, state, layers=kept)

    twin = copy.deepcopy(model)
    twin.model.layers = torch.nn.ModuleList(twin.model.layers[layer] for layer in kept)
    twin.config.num_hidden_layers = len(kept)
    linearized.slots.assign_slots(twin)
    own = linearized.new_state(twin, batch_size=2)
    linear = [layers.index(layer) for layer in kept if layer in layers]
    softmax = [n for n, layer in enumerate(x for x in range(4) if x not in layers) if layer in kept]
    for name, tensor in own.layers.tensors().items():
        theirs = state.layers.tensors()[name]
        if name == "length" or linear:
            tensor.copy_(theirs if name == "length" else theirs[linear])
    if own.history is not None:
        own.history.reserve(state.history.room)
        own.history.keys.copy_(state.history.keys[softmax])
        own.history.values.copy_(state.history.values[softmax])
        own.history.filled.copy_(state.history.filled)
    want, _ = linearized.verify(twin, *tree, own)
    torch.testing.assert_close(got, want)


def test_shortened_models_share_all_weights(llama):
    model = hybrid_of(llama, (1, 2))
    owned = {parameter.data_ptr() for parameter in model.parameters()}
    linearized.fingerprint(model)
    for layers in ([0], [1, 3], [0, 1, 2]):
        part = shortened(model, layers)
        assert {parameter.data_ptr() for parameter in part.parameters()} <= owned
        kept = [value for value in part.__dict__.values() if isinstance(value, torch.Tensor)]
        assert not kept
    assert len(model.model.layers) == 4 == model.config.num_hidden_layers
    twin = copy.deepcopy(model)
    assert {parameter.data_ptr() for parameter in twin.parameters()}.isdisjoint(owned)


def test_an_encoder_has_no_slots_and_a_decoder_two_kinds(recwarn):
    config = transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    linearized.linearize(model, linearized.LinearConfig(attention="grouped"))
    assert {slot_of(module) for module in attention_modules(model.encoder)} == {None}
    found = [slot_of(module) for module in attention_modules(model.decoder)]
    assert found == [Slot("linear", 0), Slot("cross", 0), Slot("linear", 1), Slot("cross", 1)]
