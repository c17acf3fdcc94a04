"""Token trees and the walk down them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linearized.errors import ConfigError
from linearized.speculative import TokenTree


def test_the_walk_follows_the_model_and_adds_one():
    tree = TokenTree(tokens=(5, 6, 7, 8), parents=(-1, -1, 1, 2))
    assert tree.walk([6, 0, 7, 8, 9]) == ([1, 2, 3], [6, 7, 8, 9])
    assert tree.walk([5, 3, 0, 0, 0]) == ([0], [5, 3])
    assert tree.walk([4, 1, 1, 1, 1]) == ([], [4])
    assert TokenTree.empty.walk([4]) == ([], [4])


@given(st.data())
def test_the_walk_gives_what_step_by_step_decoding_gives(data):
    """For a model whose next token is a function of the path so far."""
    num_nodes = data.draw(st.integers(0, 12))
    parents = tuple(data.draw(st.integers(-1, n - 1)) for n in range(num_nodes))
    tokens = tuple(data.draw(st.integers(0, 2)) for _ in range(num_nodes))
    tree = TokenTree(tokens, parents)

    def path(node: int) -> tuple[int, ...]:
        return () if node < 0 else (*path(parents[node]), tokens[node])

    def model(so_far: tuple[int, ...]) -> int:
        return hash(so_far) % 3

    chosen = [model(path(node)) for node in range(-1, num_nodes)]
    nodes, new = tree.walk(chosen)
    text: tuple[int, ...] = ()
    for token in new:
        assert token == model(text)
        text += (token,)
    assert len(new) == len(nodes) + 1
    assert [tokens[node] for node in nodes] == new[:-1]
    last = nodes[-1] if nodes else -1
    assert not any(p == last and t == new[-1] for p, t in zip(parents, tokens, strict=True))


def test_what_is_no_tree_is_refused():
    with pytest.raises(ConfigError, match="node 1"):
        TokenTree((1, 2), (-1, 1))
    with pytest.raises(ConfigError, match="one parent a token"):
        TokenTree((1, 2), (-1,))
    with pytest.raises(ConfigError, match="node 0"):
        TokenTree((1,), (-2,))
