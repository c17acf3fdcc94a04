"""The fastest way to multiply is chosen from times, and a weight laid out knows when it is old."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from linearized import products
from linearized.products import EAGER, ROUTINES, ROWS, Choice, Laid, choose, fastest

needs_onednn = pytest.mark.skipif(not products.available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """What other tests have measured is not known here, and the other way round."""
    monkeypatch.setattr(products, "_known", {})


def packed(layer, name):
    laid = Laid(layer.weight, name)
    return lambda x: laid.multiply(x, layer.bias)


def times(**shares):
    """Thrice a second for eager torch, this share of it for others, at every number of rows."""
    found = {(rows, EAGER): [1.0] * 3 for rows in ROWS}
    for name, share in shares.items():
        for i, rows in enumerate(ROWS):
            found[rows, name] = [share[i] if isinstance(share, list) else share] * 3
    return found


def test_eager_torch_wins_ties():
    assert choose(times()) == Choice()
    assert choose(times(onednn=1.2)) == Choice()
    assert choose(times(onednn=0.95)) == Choice()
    assert choose(times(onednn=0.85)).names == ("onednn",) * len(ROWS)
    assert choose({}) == Choice()


def test_each_number_of_rows_has_its_own_choice():
    choice = choose(times(onednn=[2, 2, 1, 0.95, 0.5, 0.6, 0.85, 1, 1.5]))
    assert choice.names == (EAGER,) * 4 + ("onednn",) * 3 + (EAGER,) * 2
    assert choice.layouts == ["onednn"]
    assert [choice.at(n) for n in (0, 1, 8, 11, 12, 20, 64, 127, 129, 10_000)] == [
        EAGER, EAGER, EAGER, EAGER, "onednn", "onednn", "onednn", "onednn", EAGER, EAGER,
    ]  # fmt: skip


def test_bfloat16_is_for_all_numbers_of_rows_or_for_none():
    """Else a text would depend on how many tokens a step reads."""
    mostly = [1.1, 1, 0.9, 0.5, 0.4, 0.3, 0.3, 0.3, 0.3]
    assert choose(times(bfloat16=mostly)).names == ("bfloat16",) * len(ROWS)
    assert choose(times(bfloat16=mostly, onednn=0.1)).names == ("onednn",) * len(ROWS)
    assert choose(times(bfloat16=[3.0] * 8 + [0.9])) == Choice()


def test_a_layout_is_worth_its_memory():
    assert choose(times(onednn=[1.0] * 8 + [0.8])) == Choice()
    assert choose(times(onednn=[1.0] * 8 + [0.5])).layouts == ["onednn"]


def test_what_was_not_measured_often_enough_stays_eager():
    found = times(onednn=0.5)
    found[8, "onednn"] = [0.5] * 2
    found[16, EAGER] = [1.0] * 2
    del found[32, "onednn"]
    choice = choose(found)
    assert [choice.at(rows) for rows in (4, 8, 16, 32, 64)] == [
        "onednn", EAGER, EAGER, EAGER, "onednn",
    ]  # fmt: skip


def test_one_lucky_time_is_not_enough():
    found = times(onednn=1.5)
    for rows in ROWS:
        found[rows, EAGER] = [1.0] * 8
        found[rows, "onednn"] = [0.1] + [1.5] * 7
    assert choose(found) == Choice()


@needs_onednn
def test_measured_once_for_a_shape_and_number_of_threads(monkeypatch):
    asked = []
    measure = products._measure
    monkeypatch.setattr(
        products, "_measure", lambda *given: (asked.append(given), measure(*given))[1]
    )
    layers = [nn.Linear(*shape) for shape in ((16, 8), (8, 16), (16, 8))]
    state = torch.random.get_rng_state()
    first = fastest(layers, torch.float32, packed)
    assert set(first) == {(8, 16), (16, 8)}
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fastest(layers[1:], torch.float32, packed) == first
    assert len(asked) == 1
    more = fastest([*layers, nn.Linear(8, 4)], torch.float32, packed)
    assert {shape: more[shape] for shape in first} == first
    assert len(asked) == 2
    fastest(layers, torch.bfloat16, packed)
    assert fastest(layers, torch.float32, packed) == first
    assert [given[1] for given in asked] == [["onednn"], ["onednn"], ["onednn", "bfloat16"]]


@needs_onednn
def test_time_that_runs_out_leaves_eager_torch(monkeypatch):
    monkeypatch.setattr(products, "BUDGET", -1.0)
    assert fastest([nn.Linear(16, 8)], torch.float32, packed) == {(8, 16): Choice()}


def test_a_ring_holds_every_shape():
    small, large = [nn.Linear(4, 4) for _ in range(5)], nn.Linear(8, 8)
    ring = products._ring([*small, large], 100)
    assert ring == [*small[:2], large]
    assert len(products._ring([*small, large], 0)) == 2


@needs_onednn
@pytest.mark.parametrize("name,error", [("onednn", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("biased", [False, True])
def test_routines_multiply(name, error, biased):
    weight = torch.randn(40, 24)
    bias = torch.randn(40) if biased else None
    laid = Laid(weight, name)
    assert laid.nbytes == weight.nbytes // (1 if name == "onednn" else 2)
    for shape in ((24,), (1, 24), (2, 24), (2, 3, 24), (70, 24)):
        x = torch.randn(shape)
        want, got = F.linear(x, weight, bias), laid.multiply(x, bias)
        assert got.shape == want.shape and got.dtype == torch.float32
        assert (got - want).norm() <= error * want.norm()


@needs_onednn
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (9, 1), (9, 2), (1, 9)])
def test_a_write_to_any_row_is_seen(shape):
    for row in range(shape[0]):
        weight = torch.randn(shape)
        laid = Laid(weight, "onednn")
        assert laid.is_of(weight)
        weight.data[row] += 1
        assert not laid.is_of(weight), row


@needs_onednn
def test_a_write_to_any_column_is_seen():
    for column in range(24):
        weight = torch.randn(40, 24)
        laid = Laid(weight, "onednn")
        weight.detach().numpy()[:, column] = 0
        assert not laid.is_of(weight), column


@needs_onednn
def test_what_else_is_seen():
    writes = {
        "in place": lambda w: w[3, 3].zero_(),
        "other storage": lambda w: w.set_(w.clone()),
        "through numpy": lambda w: np.multiply(w.numpy(), 2, out=w.numpy()),
        "through data": lambda w: w.data.mul_(2),
        "no numbers": lambda w: w.data.fill_(float("nan")),
    }
    for name, write in writes.items():
        weight = torch.randn(8, 8)
        laid = Laid(weight, "onednn")
        write(weight)
        assert not laid.is_of(weight), name
        assert Laid(weight, "onednn").is_of(weight), name
    with torch.inference_mode():
        weight = torch.randn(8, 8)
        laid = Laid(weight, "onednn")
        assert laid.is_of(weight)
        weight.mul_(2)
        assert not laid.is_of(weight)


@needs_onednn
def test_the_address_of_a_weight_is_not_given_away_while_it_is_laid_out():
    """Else another weight at that address could be taken for it."""
    for _, size in itertools.product(range(20), (8, 64)):
        weight = torch.randn(size, size)
        laid = Laid(weight, "onednn")
        pointer = weight.data_ptr()
        weight.data = torch.empty(0)
        assert torch.empty(size, size).data_ptr() != pointer
        assert not laid.is_of(weight)


def test_routines_have_names_that_choices_use():
    assert EAGER not in ROUTINES
