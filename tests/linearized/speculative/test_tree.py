"""Token trees and the walk down them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linearized.errors import ConfigError
from linearized.speculative import Shape, TokenTree


@st.composite
def trees(draw) -> TokenTree:
    """With scores of which many are equal."""
    size = draw(st.integers(0, 10))
    parents = tuple(draw(st.integers(-1, n - 1)) for n in range(size))
    scores: list[float] = []
    for parent in parents:
        above = scores[parent] if parent >= 0 else 1.0
        scores.append(above * draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])))
    return TokenTree(tuple(range(size)), parents, tuple(scores))


def lineage(tree: TokenTree, node: int) -> list[int]:
    """The node and all above it, top first."""
    return [] if node < 0 else [*lineage(tree, tree.parents[node]), node]


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
    with pytest.raises(ConfigError, match="one score a token"):
        TokenTree((1, 2), (-1, 0), (0.5,))
    with pytest.raises(ConfigError, match=r"node 1 has score 0\.6"):
        TokenTree((1, 2), (-1, 0), (0.5, 0.6))
    with pytest.raises(ConfigError, match=r"node 0 has score 1\.5"):
        TokenTree((1,), (-1,), (1.5,))


@given(trees())
def test_what_a_tree_says_of_its_nodes(tree):
    lines = [lineage(tree, node) for node in range(len(tree))]
    assert tree.depths == [len(line) for line in lines]
    assert tree.paths() == [tuple(line) for line in lines]  # a node's token is its number here
    expected = [[other in line for other in range(len(tree))] for line in lines]
    assert torch.equal(tree.ancestors, torch.tensor(expected).reshape(len(tree), len(tree)))


@given(trees(), st.integers(0, 11))
def test_the_best_nodes_are_the_most_probable_ones(tree, size):
    best = tree.best(size)
    assert len(best) == min(size, len(tree))
    assert sorted(best.scores) == sorted(tree.scores)[len(tree) - len(best) :]
    assert set(best.paths()) <= set(tree.paths())
    assert best.scores == tuple(tree.scores[token] for token in best.tokens)
    bare = TokenTree(tree.tokens, tree.parents)
    assert bare.best(size) == TokenTree(tree.tokens[:size], tree.parents[:size])


@given(trees(), st.integers(0, 11), st.data())
def test_the_best_of_those_that_may_be(tree, size, data):
    may = [data.draw(st.booleans()) for _ in range(len(tree))]
    asked = []

    def ask(node):
        asked.append(node)
        return may[node]

    found = tree.that(ask, size)
    able = [n for n in range(len(tree)) if all(may[one] for one in lineage(tree, n))]
    scores = sorted((tree.scores[node] for node in able), reverse=True)[:size]
    assert sorted(found.scores, reverse=True) == scores
    assert set(found.tokens) <= {*able} and set(found.paths()) <= set(tree.paths())
    assert len(set(asked)) == len(asked)  # and of none behind one that may not be
    assert all(may[above] for node in asked for above in lineage(tree, node)[:-1])
    assert tree.that(lambda node: True, len(tree)) is tree


@given(trees(), st.data())
def test_the_deepest_path_is_accepted_all_along(tree, data):
    accepted = [data.draw(st.booleans()) for _ in range(len(tree))]
    lines = [lineage(tree, node) for node in range(len(tree))]
    whole = [line for line in lines if all(accepted[node] for node in line)]
    longest = max(map(len, whole), default=0)
    assert tree.deepest(accepted) == next((line for line in whole if len(line) == longest), [])


@pytest.mark.parametrize("size", range(1, 8))
def test_a_sparse_tree_is_the_one_that_is_most_often_right(size):
    """Against every set of paths of this size that holds the beginnings of its paths."""
    accuracies = [[0.5, 0.3, 0.1], [0.6, 0.2], [0.35, 0.3]]
    paths = [
        path
        for depth in range(1, len(accuracies) + 1)
        for path in itertools.product(*(range(len(row)) for row in accuracies[:depth]))
    ]

    def right(path: tuple[int, ...]) -> float:
        chance = 1.0
        for row, rank in zip(accuracies, path, strict=False):
            chance *= row[rank]
        return chance

    # A path is never likelier than its beginning, so the likeliest paths are such a set.
    best = sum(sorted(map(right, paths), reverse=True)[:size])
    shape = Shape.sparse(accuracies, size)
    tree = TokenTree(shape.ranks, shape.parents)
    assert len(set(tree.paths())) == size and set(tree.paths()) <= set(paths)
    assert sum(map(right, tree.paths())) == pytest.approx(best)
    assert len(Shape.sparse(accuracies, 100)) == len(paths)


def test_a_shape_is_filled_as_far_as_there_are_guesses():
    shape = Shape(ranks=(0, 1, 0, 1, 0), parents=(-1, -1, 0, 1, 2))
    full = shape.fill([[5, 6], [7, 8], [9]], [[0.5, 0.25], [0.5, 0.25], [1.0]])
    assert full == TokenTree((5, 6, 7, 8, 9), (-1, -1, 0, 1, 2), (0.5, 0.25, 0.25, 0.0625, 0.25))
    one_rank = shape.fill([[5], [7, 8], [9]], [[0.5], [0.5, 0.25], [1.0]])
    assert one_rank == TokenTree.chain((5, 7, 9), (0.5, 0.25, 0.25))
    assert shape.fill([[5, 6]], [[0.5, 0.25]]).parents == (-1, -1)
    assert Shape.chain(3).fill([[1], [2], [3]], [[1.0]] * 3) == TokenTree.chain(
        (1, 2, 3), (1.0,) * 3
    )


def test_what_stands_below_some_tokens():
    tree = TokenTree((1, 2, 3, 4, 5, 6), (-1, -1, 0, 0, 2, 3), (0.8, 0.2, 0.4, 0.2, 0.1, 0.2))
    assert tree.below([]) is tree
    assert tree.below([1]) == TokenTree((3, 4, 5, 6), (-1, -1, 0, 1), (0.5, 0.25, 0.125, 0.25))
    assert tree.below([1, 4]) == TokenTree((6,), (-1,), (1.0,))
    for missing in ([2, 1], [1, 4, 6, 6], [7], [2]):
        assert tree.below(missing) == TokenTree.empty
    assert TokenTree.chain([1, 2], [0.0, 0.0]).below([1]) == TokenTree.chain([2], [0.0])
    assert TokenTree.chain([1, 2, 3]).below([1]) == TokenTree.chain([2, 3])


def test_the_first_levels():
    tree = TokenTree((1, 2, 3, 4), (-1, 0, 1, -1), (0.5, 0.4, 0.3, 0.2))
    assert tree.top(3) is tree
    assert tree.top(1) == TokenTree((1, 4), (-1, -1), (0.5, 0.2))
    assert tree.top(0) == TokenTree.empty
