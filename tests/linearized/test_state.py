"""Decode states: bytes, rows, and what `commit` refuses."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

import linearized
from linearized.errors import StateError
from linearized.state import FORMAT, PAGE, DecodeState


def extended(model, length: int, batch: int = 1, seed: int = 0) -> linearized.DecodeState:
    generator = torch.Generator().manual_seed(seed)
    state = linearized.new_state(model, batch_size=batch)
    tokens = torch.randint(1, model.config.vocab_size, (batch, length), generator=generator)
    linearized.extend(model, tokens, state)
    return state


@pytest.mark.parametrize("near", ["", "local", "grouped", "hedgehog"])
def test_bytes_round_trip(linear, near):
    model = linear(near=near)
    state = extended(model, 21, batch=2)
    back = linearized.DecodeState.from_bytes(state.to_bytes())
    back.check(linearized.fingerprint(model))
    tokens = torch.ones(2, 3, dtype=torch.long)
    want = linearized.extend(model, tokens, state)
    assert torch.equal(want, linearized.extend(model, tokens, back))


@pytest.mark.parametrize("layers", [None, (0,)])
@pytest.mark.parametrize("near", ["", "grouped"])
def test_equal_states_give_equal_bytes(linear, near, layers):
    """However often, and whatever lies beyond the end of a hybrid's history."""
    model = linear(near=near, linearize=layers)
    state = extended(model, 21, batch=2)
    if state.history is not None:
        longer = state.clone()
        longer.history.reserve(64)
        longer.history.keys[:, :, :, 21:] = 5.0
        longer.history.values[:, :, :, 21:] = float("nan")
        assert longer.to_bytes() == state.to_bytes()
    blobs = {state.to_bytes() for _ in range(30)} | {state.clone().to_bytes()}
    back = linearized.DecodeState.from_bytes(state.to_bytes())
    assert blobs == {back.to_bytes()}
    state.layers.values[0, 0, 0, 0, 0] += 1
    assert state.to_bytes() not in blobs


def test_a_note_travels_in_the_header(linear):
    state = extended(linear(), 21)
    blob = state.to_bytes(note="of a text")
    assert DecodeState.note(blob) == "of a text" and DecodeState.note(state.to_bytes()) == ""
    assert DecodeState.from_bytes(blob).to_bytes() == state.to_bytes() != blob
    with pytest.raises(StateError):
        DecodeState.note(b"hello")


@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: b"",
        lambda blob: b"hello",
        lambda blob: blob[: len(blob) // 2],
        lambda blob: blob.replace(FORMAT.encode(), FORMAT[:-1].encode() + b"0"),
        lambda blob: b"\x80\x04K\x01." + blob,
        lambda blob: (1 << 62).to_bytes(8, "little") + blob[8:],
        lambda blob: (1 << 17).to_bytes(8, "little") + b"[" * (1 << 17) + blob,
    ],
    ids=["empty", "text", "cut", "version", "pickle", "huge header", "deep header"],
)
def test_damaged_bytes_are_refused(linear, damage):
    blob = damage(extended(linear(), 5).to_bytes())
    with pytest.raises(StateError):
        linearized.DecodeState.from_bytes(blob)


NARROW = [("memory", 3), ("keys", 3), ("values", 4), ("tail", 0), ("length", 0)]


@pytest.mark.parametrize("name, dim", NARROW)
def test_tensors_that_do_not_fit_are_refused(linear, name, dim):
    """By each other where that can be seen, else by the model."""
    model = linear()
    state = extended(model, 5)
    tensors = {n: t.contiguous() for n, t in state.layers.tensors().items()}
    near = json.dumps({"group": 8, "window": 0, "sinks": 0})
    metadata = {"format": FORMAT, "fingerprint": linearized.fingerprint(model), "near": near}
    wrong = [tensors[name].narrow(dim, 0, tensors[name].shape[dim] - 1), tensors[name].half()]
    if name == "length":
        wrong.append(tensors[name] - 9)
    for tensor in wrong:
        changed = {**tensors, name: tensor.contiguous()}
        with pytest.raises(StateError, match="damaged"):
            read = linearized.DecodeState.from_bytes(safetensors.torch.save(changed, metadata))
            linearized.extend(model, torch.tensor([[1]]), read)


WHICH = {"group": 8, "window": 1, "sinks": 3}


@pytest.mark.parametrize(
    "near",
    [
        None,
        "",
        "[" * 100_000,
        "[8, 1, 3]",
        *(json.dumps({**WHICH, "sinks": sinks}) for sinks in (2, -1, True, 3.0, None, "3")),
        *(json.dumps({**WHICH, "group": group}) for group in (0, 1 << 40)),
        json.dumps({"group": 8, "window": 1}),
        json.dumps({**WHICH, "colour": 1}),
        *(json.dumps({**WHICH, "group": g, "window": w}) for g, w in ((16, 0), (4, 3), (2, 7))),
        json.dumps({"group": 1, "window": 0, "sinks": 18}),
    ],
    ids=lambda near: str(near)[:50],
)
def test_slots_that_mean_something_else_are_refused(linear, near):
    """Where each token is kept is part of a state; as many slots do not tell."""
    model = linear(near="grouped")
    state = extended(model, 21)
    tensors = {n: t.contiguous() for n, t in state.layers.tensors().items()}
    metadata = {"format": FORMAT, "fingerprint": linearized.fingerprint(model)}
    if near is not None:
        metadata["near"] = near
    with pytest.raises(StateError, match="damaged") as refused:
        read = linearized.DecodeState.from_bytes(safetensors.torch.save(tensors, metadata))
        linearized.extend(model, torch.tensor([[1]]), read)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("setting", [{"window": 2}, {"sinks": 2}, {"group": 4}], ids=str)
def test_a_state_of_another_window_is_refused(llama, setting):
    models = [
        linearized.linearize(
            llama(), linearized.LinearConfig(**{"attention": "grouped", **WHICH, **given})
        )
        for given in ({}, setting)
    ]
    with pytest.raises(StateError, match="belongs to model"):
        linearized.extend(models[1], torch.ones(1, 3, dtype=torch.long), extended(models[0], 21))


def test_a_state_made_in_inference_mode_is_an_ordinary_one(linear):
    model = linear()
    tokens = torch.randint(1, 50, (1, 20))
    with torch.inference_mode():
        state = linearized.new_state(model)
        first = linearized.extend(model, tokens[:, :9], state)
    rest = linearized.extend(model, tokens[:, 9:], state)
    want = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(torch.cat([first.clone(), rest], dim=1), want)


def test_another_model_is_refused(linear):
    state = extended(linear(seed=0), 5)
    with pytest.raises(StateError, match="belongs to model"):
        state.check(linearized.fingerprint(linear(seed=1)))
    with pytest.raises(StateError, match="belongs to model"):
        extended(linear(seed=1), 5).copy_(state)


def test_rows(linear):
    model = linear()
    state = extended(model, 13, batch=3)
    picked = state.select([2, 0])
    assert picked.batch_size == 2 and picked.num_layers == 2
    assert torch.equal(picked.layers.memory[:, 0], state.layers.memory[:, 2])
    assert picked.nbytes * 3 == state.nbytes * 2
    with pytest.raises(StateError, match="2 rows"):
        state.copy_(picked)


def test_commit_refuses_what_is_no_path(linear):
    model = linear()
    state = extended(model, 9)
    tokens = torch.tensor([[3, 4, 5, 6]])
    parents = torch.tensor([[-1, 0, 0, 1]])
    _, pending = linearized.verify(model, tokens, parents, state)
    for path in ([1], [0, 3], [0, 1, 2], [0, 4], [-1], [0, 0]):
        with pytest.raises(StateError, match="no path"):
            linearized.commit(state, pending, [path])
    with pytest.raises(StateError, match="one path a row"):
        linearized.commit(state, pending, [[0], [0]])
    linearized.commit(state, pending, [[]])
    assert state.length.tolist() == [9]
    linearized.commit(state, pending, [[0, 1, 3]])
    assert state.length.tolist() == [12]
    with pytest.raises(StateError, match="verify again"):
        linearized.commit(state, pending, [[0]])


def test_commit_refuses_nodes_of_another_state(linear):
    """Also where its rows are as long; a copy of the state will do."""
    model = linear()
    state, other = extended(model, 5), extended(model, 5, seed=1)
    copy = state.clone()
    nodes, parents = torch.tensor([[7, 8]]), torch.tensor([[-1, 0]])
    _, pending = linearized.verify(model, nodes, parents, state)
    with pytest.raises(StateError, match="verified against another state"):
        linearized.commit(other, pending, [[0, 1]])
    assert other.length.tolist() == [5]
    linearized.commit(copy, pending, [[0, 1]])
    linearized.commit(state, pending, [[0, 1]])
    with pytest.raises(StateError, match="moved on since"):
        linearized.commit(state, pending, [[0, 1]])
    assert copy.length.tolist() == state.length.tolist() == [7]


def hybrid(llama):
    config = linearized.LinearConfig(attention="grouped", group=8, taps=5, layers=(0,))
    return linearized.linearize(llama().double(), config)


def test_a_history_that_grows_through_a_view_grows_for_all_rows(llama):
    model = hybrid(llama)
    state = linearized.new_state(model, batch_size=3)
    tokens = torch.randint(1, 60, (3, 2 * PAGE + 9))
    for row, length in enumerate((PAGE - 1, 2 * PAGE + 9, 7)):
        linearized.extend(model, tokens[row : row + 1, :length], state.rows(row, row + 1))
    both = state.rows(0, 2)
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    linearized.extend(model, tokens[:2, :4], both, mask=mask)
    for row, length in enumerate((PAGE - 1, 2 * PAGE + 9, 7)):
        alone = linearized.new_state(model)
        linearized.extend(model, tokens[row : row + 1, :length], alone)
        if row < 2:
            linearized.extend(model, tokens[row : row + 1, : 4 - 2 * row], alone)
        count = int(alone.length)
        assert int(state.history.filled[row]) == count == int(state.length[row])
        mine, theirs = state.history.keys[:, row], alone.history.keys[:, 0]
        torch.testing.assert_close(mine[:, :, :count], theirs[:, :, :count])


def test_numbers_that_are_none_stay_in_no_row(llama):
    """Neither those of a text that was there before, nor those of padding."""
    history = linearized.new_state(hybrid(llama), batch_size=2).history
    keys = torch.full((*history.keys.shape[:3], 4, history.keys.shape[4]), torch.nan).double()
    mask = torch.tensor([[True] * 4, [False] * 4])
    history.append(keys, keys, torch.zeros(2, dtype=torch.int64), mask)
    assert history.keys[:, 1].isfinite().all()
    empty = linearized.new_state(hybrid(llama), batch_size=2).history
    history.copy_(empty)
    assert history.keys.isfinite().all() and history.values.isfinite().all()


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_states_made_in_inference_mode_go_on_outside(linear, llama, kind):
    model = linear() if kind == "linear" else hybrid(llama)
    tokens = torch.randint(1, 60, (1, 9))
    with torch.inference_mode():
        state = linearized.new_state(model)
        linearized.extend(model, tokens, state)
        copies = [state.clone(), state.select([0]), DecodeState.from_bytes(state.to_bytes())]
    want = linearized.extend(model, tokens, state)
    for copy in copies:
        torch.testing.assert_close(linearized.extend(model, tokens, copy), want)
