"""Trees that grow by levels: on each, all nodes so far are verified in one forward of whoever
drafts, and the most probable continuations are added. Knows scores; knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from linearized.speculative.drafters.base import Ask
from linearized.speculative.tree import TokenTree


def grow(
    growths: Sequence[Growth],
    forward: Callable[[Tensor, Tensor], Tensor],
    *,
    width: int,
    least: float,
    device: torch.device,
) -> None:
    """Until no guess is worth following. `forward(tokens, parents)`, both [B, N], gives logits
    [B, N, V] of a tree on top of each text's state; rows are padded with nobody's parents. `width`:
    guesses that are followed on each level; `least`: the log-probability of a whole path, as the
    drafter sees it, below which a guess is left out."""
    for level in range(max(growth.ask.depth for growth in growths)):
        widest = max(len(growth.tokens) for growth in growths)
        tokens, parents = [], []
        for growth in growths:
            missing = widest - len(growth.tokens)
            tokens.append([*growth.tokens, *[0] * missing])
            parents.append([*growth.parents, *[-1] * missing])
        logits = forward(torch.tensor(tokens, device=device), torch.tensor(parents, device=device))
        for row, growth in enumerate(growths):
            if level < growth.ask.depth:
                growth.add(logits[row], min(width, growth.ask.nodes), least)
            else:
                growth.frontier = []
        if not any(growth.frontier for growth in growths):
            return


@dataclass(slots=True)
class Growth:
    """A tree in the making: the tokens that the draft has not read yet, one after the other, and
    guesses behind the last of them."""

    ask: Ask
    num_read: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    guesses: list[float] = field(default_factory=list)
    """Logarithms of the probabilities of the guesses' paths."""
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

    def add(self, logits: Tensor, width: int, least: float) -> None:
        """A level more, from logits [N, V] at the nodes."""
        if not self.frontier:
            return
        text, last = self.ask.text, self.num_tail - 1
        nodes = [last if guess < 0 else self.num_tail + guess for guess in self.frontier]
        paths = [() if guess < 0 else self.paths[guess] for guess in self.frontier]
        likely = [0.0 if guess < 0 else self.guesses[guess] for guess in self.frontier]
        # With the shared noise in them, the scores tell how sure this very guess is.
        scores = text.sampler.scores(logits[nodes], text.tokens, paths).log_softmax(1)
        scores = scores + scores.new_tensor(likely)[:, None]
        follow = math.log(self.ask.follow) if self.ask.follow > 0 else -math.inf
        best = scores.flatten().topk(min(width, scores.numel()))
        frontier = []
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if value < least:
                break
            row, token = divmod(index, scores.shape[1])
            if value >= follow:
                frontier.append(len(self.guesses))
            self.tokens.append(token)
            self.parents.append(nodes[row])
            self.guesses.append(min(value, likely[row]))
            self.paths.append((*paths[row], token))
        self.frontier = frontier

    def tree(self) -> TokenTree:
        parents = tuple(max(parent - self.num_tail, -1) for parent in self.parents[self.num_tail :])
        scores = tuple(math.exp(guess) for guess in self.guesses)
        return TokenTree(tuple(self.tokens[self.num_tail :]), parents, scores)
