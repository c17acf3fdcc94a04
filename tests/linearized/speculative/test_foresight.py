"""A tree that grows, the most probable first, and goes on with its text."""

from __future__ import annotations

import pytest

from linearized.speculative import Foresight, Sampling, Text, TokenTree
from linearized.speculative.record import Record


def text(*tokens: int) -> Text:
    return Text(tokens, sampling=Sampling(), max_new_tokens=100, num_prompt=1)


def grown(**settings) -> Foresight:
    """[5] 10 .5 (20 .8 (30 .5), 21 .1), 11 .15"""
    it = Foresight(text(5), 99, **settings)
    it.add([-1], [([0.25, 0.15, 0.001], [10, 11, 12])])  # the last one is not worth keeping
    it.add([0], [([0.64, 0.1], [20, 21])])  # a first one is right more often than it is probable
    it.add([2], [([0.25], [30])])
    return it


def test_guesses_and_their_scores():
    tree = grown().tree()
    assert tree.tokens == (10, 11, 20, 21, 30)
    assert tree.parents == (-1, -1, 0, 0, 2)
    assert tree.scores == pytest.approx((0.5, 0.15, 0.4, 0.05, 0.2))


def test_the_most_probable_come_first_and_none_twice():
    it = grown()
    front = it.frontier(9, 3)
    assert [it.tokens[node] for node in front] == [30, 11, 21]
    assert [it.path(node) for node in front] == [(10, 20, 30), (11,), (10, 21)]
    assert [it.tokens[node] for node in it.frontier(2, 9)] == [11]  # the others are as deep
    assert it.above([4]) == [0, 2, 4] and it.above([3, 1]) == [0, 1, 3] and it.above([-1]) == []


def test_how_much_the_drafter_s_word_is_worth_is_learnt_from_what_became_of_it():
    def scores(it: Foresight) -> dict[int, float]:
        return dict(zip(it.tree().tokens, it.tree().scores, strict=True))

    def look(it: Foresight) -> None:
        it.add([-1], [([0.25, 0.15], [10, 11])])

    shared = Record()
    for _ in range(40):
        it = Foresight(text(5), 99, shared=shared)
        look(it)
        it.text.tokens += [11, 20]  # its second guess is always right
        it.go_on()
    later, alone = Foresight(text(5), 99, shared=shared), Foresight(text(5), 99)
    for it in (later, alone):
        look(it)
    assert scores(later)[10] < 0.2 and scores(later)[11] > 0.8
    assert scores(alone) == pytest.approx({10: 0.5, 11: 0.15})
    for _ in range(40):  # a text in which it is the first one
        alone.text.tokens += [10, 99]
        alone.go_on()
        look(alone)
    assert scores(alone)[10] > 0.8 and scores(alone).get(11, 0.0) < 0.1


def test_what_stands_behind_the_new_tokens_is_kept():
    it = grown()
    it.text.tokens += [10, 20]
    assert it.go_on() and it.length == 3
    assert (it.tree().tokens, it.tree().parents) == ((30,), (-1,))
    assert it.tree().scores == pytest.approx((0.5,), abs=0.01)
    assert it.seen(1) and not it.seen(2)
    it.add(it.frontier(9, 1), [([0.9], [40])])
    it.text.tokens += [30, 40]
    assert it.go_on() and not it.tree()
    assert it.frontier(9, 9) == [-1] and not it.seen(1)


def test_all_is_dropped_when_the_text_goes_another_way():
    for new in ([12], [10, 99], [10, 20, 30, 5]):
        it = grown()
        it.text.tokens += new
        assert not it.go_on()
        assert not it.tree() and it.frontier(9, 9) == [-1]


def test_there_is_an_end_to_looking_ahead():
    it = Foresight(text(5), 3)
    it.add([-1], [([0.5, 0.2], [10, 11])])
    assert not it.seen(2)
    it.add([0], [([0.5, 0.4], [20, 21])])  # there is room for one
    assert it.tree().tokens == (10, 11, 20) and not it.frontier(9, 9) and it.seen(9)
    it = Foresight(text(5), 99)
    it.add([-1], [([float("nan"), 0.9], [10, 11])])
    assert not it.tree() and it.seen(9)


def test_a_tree_that_is_all_there_is():
    it = Foresight(text(5), 99)
    it.replace(TokenTree.chain([1, 2, 3], [1.0, 0.0, 0.0]))
    assert it.seen(9) and not it.frontier(9, 9)
    it.text.tokens += [1]
    assert not it.go_on() and not it.seen(1)  # to be asked for anew
    assert it.frontier(1, 1) == [-1]
