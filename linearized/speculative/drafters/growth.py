"""Trees that grow by levels: on each, all nodes so far are verified in one forward of whoever
drafts, and the most probable continuations are added. Knows scores; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from linearized.speculative.chooser import Place, scored
from linearized.speculative.drafters.base import Ask
from linearized.speculative.tree import TokenTree
from linearized.tree import Tree


def grow(
    growths: Sequence[Growth],
    forward: Callable[[Tree], Tensor],
    *,
    width: int,
    floor: float,
    device: torch.device,
) -> None:
    """Until no guess is worth following. `forward` gives logits [B, N, V] of a tree on top of each
    text's state; rows are padded with nobody's parents. `width`:
    guesses that are followed on each level; `floor`: how likely a guess's whole path must be right
    for it to be in the tree."""
    for level in range(max(growth.ask.depth for growth in growths)):
        nodes = [(growth.tokens, growth.parents) for growth in growths]
        logits = forward(Tree.side_by_side(nodes, device))
        for growth in growths:
            if level >= growth.ask.depth:
                growth.frontier = []
        for growth, guesses in zip(growths, _guesses(growths, logits, width), strict=True):
            growth.add(guesses, min(width, growth.ask.nodes), floor)
        if not any(growth.frontier for growth in growths):
            return


Guesses = list[tuple[list[float], list[int]]]
"""Behind each node of a frontier: probabilities, best first, and their tokens."""


def _guesses(growths: Sequence[Growth], logits: Tensor, width: int) -> list[Guesses]:
    """For each growth, from logits [B, N, V]; one transfer to the host for all of them."""
    rows, places = [], []
    for number, growth in enumerate(growths):
        first = number * logits.shape[1] + growth.num_tail
        rows += [first + guess for guess in growth.frontier]  # -1: the last token
        places += [Place(growth.ask.text, growth.path(guess)) for guess in growth.frontier]
    found = iter(likeliest(logits, rows, places, width))
    return [[next(found) for _ in growth.frontier] for growth in growths]


def likeliest(logits: Tensor, rows: Sequence[int], places: Sequence[Place], width: int) -> Guesses:
    """The `width` most probable tokens at each place, whose logits are row `rows[i]` of [B, N, V]
    taken as one list."""
    found = []
    # With the shared noise in them, the scores tell how sure this very guess is.
    for _, scores in scored(logits.flatten(0, 1), rows, places):
        best = scores.log_softmax(1).topk(min(width, scores.shape[1]), dim=1)
        found.append(torch.cat([best.values.exp().double(), best.indices.double()], dim=1))
    lines = torch.cat(found).tolist() if found else []
    halves = ((line[: len(line) // 2], line[len(line) // 2 :]) for line in lines)
    return [(steps, [int(token) for token in tokens]) for steps, tokens in halves]


@dataclass(slots=True)
class Growth:
    """A tree in the making: the tokens that the draft has not read yet, one after the other, and
    guesses behind the last of them."""

    ask: Ask
    num_read: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """How probable the guesses' paths are, as the draft sees it."""
    chances: list[float] = field(default_factory=list)
    """How probable, as experience has it."""
    paths: list[tuple[int, ...]] = field(default_factory=list)
    """Of the guesses."""
    frontier: list[int] = field(default_factory=list)
    """Nodes to go on from; -1: the last token."""
    num_tail: int = 0

    def __post_init__(self) -> None:
        self.tokens = self.ask.text.tokens[self.num_read :]
        self.parents = list(range(-1, len(self.tokens) - 1))
        self.num_tail = len(self.tokens)
        self.frontier = [-1]

    def path(self, guess: int) -> tuple[int, ...]:
        """Tokens down to this guess; -1: none."""
        return self.paths[guess] if guess >= 0 else ()

    def add(self, guesses: Guesses, width: int, floor: float) -> None:
        """A level more, from guesses behind each node of the frontier."""
        if not self.frontier:
            return
        nodes = [self.num_tail + guess for guess in self.frontier]
        above = [
            (1.0, 1.0, ())
            if guess < 0
            else (self.scores[guess], self.chances[guess], self.paths[guess])
            for guess in self.frontier
        ]
        found = [
            (above[row][1] * self.ask.trust(step, rank), row, step, token)
            for row, (steps, tokens) in enumerate(guesses)
            for rank, (step, token) in enumerate(zip(steps, tokens, strict=True))
            if step > 0
        ]
        found.sort(key=lambda guess: -guess[0])
        frontier = []
        for chance, row, step, token in found[:width]:
            if chance < floor:
                break
            if chance >= self.ask.follow:
                frontier.append(len(self.scores))
            score, _, path = above[row]
            self.tokens.append(token)
            self.parents.append(nodes[row])
            self.scores.append(score * step)
            self.chances.append(chance)
            self.paths.append((*path, token))
        self.frontier = frontier

    def tree(self) -> TokenTree:
        """The most likely of its nodes, as many as are asked for."""
        parents = tuple(max(parent - self.num_tail, -1) for parent in self.parents[self.num_tail :])
        tree = TokenTree(tuple(self.tokens[self.num_tail :]), parents, tuple(self.scores))
        return tree.best(self.ask.nodes, by=self.chances)
