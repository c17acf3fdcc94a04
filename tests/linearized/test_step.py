"""A step reads and writes nothing; what it touches does not grow with the text."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import linearized
from linearized.fold import accept, fold
from linearized.state import DecodeState
from linearized.step import read, step
from linearized.tree import Tree


@pytest.fixture(params=["linear", "hybrid", "local", "hedgehog"])
def model(request, linear, llama):
    if request.param != "hybrid":
        near = "" if request.param == "linear" else request.param
        return linear(near=near)
    config = linearized.LinearConfig(attention="grouped", group=8, taps=5, layers=(1,))
    return linearized.linearize(llama().double(), config)


def bytes_of(state: DecodeState) -> bytes:
    return b"".join(x.contiguous().numpy().tobytes() for x in state._tensors().values())


@torch.no_grad()
def test_reading_and_stepping_write_nothing(model):
    tokens = torch.randint(1, 60, (2, 29))
    state = linearized.new_state(model, batch_size=2)
    linearized.extend(model, tokens, state)
    before = bytes_of(state)
    step(model, Tree.chain(tokens[:, :5]), state)
    read(model, tokens, state)
    assert bytes_of(state) == before


@torch.no_grad()
def test_a_chain_is_what_reading_it_is(model):
    tokens = torch.randint(1, 60, (2, 29))
    states = [linearized.new_state(model, batch_size=2) for _ in range(2)]
    found = [step(model, Tree.chain(tokens), states[0]), read(model, tokens, states[1])]
    torch.testing.assert_close(found[0].logits, found[1].logits)
    for one, state in zip(found, states, strict=True):
        fold(state, one.fresh)
    for name, tensor in states[0].layers.tensors().items():
        torch.testing.assert_close(tensor, states[1].layers.tensors()[name])


@torch.no_grad()
@pytest.mark.parametrize("path", [[[0, 2], [1]], [[], [0]], [[1], [1]], [[0, 2], [0, 2]]])
def test_accepted_nodes_are_as_if_they_had_been_read(model, path):
    tokens = torch.randint(1, 60, (2, 15))
    nodes = torch.randint(1, 60, (2, 3))
    tree = Tree.of(nodes, torch.tensor([[-1, -1, 0]] * 2))
    state = linearized.new_state(model, batch_size=2)
    linearized.extend(model, tokens, state)
    rows = [state.rows(row, row + 1).clone() for row in range(2)]
    accept(state, step(model, tree, state).fresh, path)
    for row, kept in enumerate(path):
        if kept:
            linearized.extend(model, nodes[row, kept][None], rows[row])
        for name, tensor in rows[row].layers.tensors().items():
            mine = state.rows(row, row + 1).layers.tensors()[name]
            torch.testing.assert_close(mine, tensor)
        if state.history is not None:
            count = int(state.length[row])
            for mine, theirs in (
                (state.history.keys, rows[row].history.keys),
                (state.history.values, rows[row].history.values),
            ):
                torch.testing.assert_close(mine[:, row, :, :count], theirs[:, 0, :, :count])


class Touched(TorchDispatchMode):
    """Bytes that operators read and write."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor):
                self.bytes += value.numel() * value.element_size()
        return out


@torch.no_grad()
def test_a_step_and_its_fold_touch_as_many_bytes_at_64k_as_at_1k(linear):
    model = linear(dtype=torch.float32)
    tree = Tree.chain(torch.tensor([[5]]))
    touched = []
    for length in (1 << 10, 1 << 16):
        state = linearized.new_state(model)
        for part in torch.randint(1, 60, (1, length + 3)).split(8192, dim=1):
            linearized.extend(model, part, state, logits_to_keep=1)
        with Touched() as mode:
            fold(state, step(model, tree, state).fresh)
        touched.append(mode.bytes)
    assert touched[0] == touched[1]
