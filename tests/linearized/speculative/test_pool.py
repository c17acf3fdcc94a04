"""Rows of a pool keep their texts' states, wherever they are moved."""

from __future__ import annotations

import random

import pytest
import torch

import linearized
from linearized.speculative.pool import Pool


@pytest.fixture(params=["linear", "hybrid"])
def model(request, linear, llama):
    if request.param == "linear":
        return linear()
    config = linearized.LinearConfig(attention="grouped", group=8, taps=5, layers=(1,))
    return linearized.linearize(llama().double(), config)


def says(model, state):
    return linearized.extend(model, torch.tensor([[7]]), state.clone())


def test_states_follow_their_keys(model):
    draw = random.Random(0)
    pool, known = Pool(model, 2), {}
    for turn in range(60):
        choice = draw.random()
        if choice < 0.4 or not known:
            state = linearized.new_state(model)
            tokens = torch.randint(1, 60, (1, draw.choice([1, 9, 300])))
            linearized.extend(model, tokens, state)
            pool.add(turn, state)
            known[turn] = state
        elif choice < 0.5:
            key = draw.choice(sorted(known))
            pool.clear(key)
            known[key] = linearized.new_state(model)
        elif choice < 0.6:
            key = draw.choice(sorted(known))
            pool.remove(key)
            del known[key]
        else:
            wanted = draw.sample(sorted(known), draw.randrange(1, len(known) + 1))
            behind = [key for key in pool.keys if key not in wanted][:1]
            order = pool.arrange(behind) + pool.arrange(wanted, start=len(behind))
            assert pool.keys[: len(order)] == order and {*order} == {*wanted, *behind}
    for key, state in known.items():
        torch.testing.assert_close(says(model, pool.row(key)), says(model, state))
    assert len(pool) == len(known) and set(pool.keys) == set(known)


def test_what_is_written_to_rows_is_in_the_pool(model):
    pool = Pool(model, 3)
    for key in "abc":
        pool.add(key)
    tokens = torch.randint(1, 60, (2, 300))
    linearized.extend(model, tokens, pool.rows(1, 3))
    for row, key in enumerate("bc"):
        alone = linearized.new_state(model)
        linearized.extend(model, tokens[row : row + 1], alone)
        torch.testing.assert_close(says(model, pool.row(key)), says(model, alone))
    assert int(pool.row("a").length) == 0


def test_bytes_are_those_of_its_rows(model):
    pool = Pool(model, 2)
    pool.reserve(300)
    assert pool.bytes_at(300) == pool.first(2).nbytes
    pool.add("a")
    pool.add("b")
    pool.add("c")
    assert pool.num_rows == 4 and pool.bytes_at(300) == pool.first(4).nbytes
