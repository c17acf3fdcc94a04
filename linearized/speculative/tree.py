"""A draft: guesses at how a sequence goes on, as a tree. Knows token ids; knows no model."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from linearized.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TokenTree:
    """`parents[i]` is the node that `tokens[i]` follows: -1 for the sequence's last token, else a
    smaller index. `scores[i]`, where the drafter has them: how probable it finds the whole path to
    node i, so never more than its parent's."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    scores: tuple[float, ...] = ()

    empty: ClassVar[TokenTree]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents):
            raise ConfigError(
                f"a tree needs one parent a token, got {len(self.tokens)} tokens and "
                f"{len(self.parents)} parents"
            )
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ConfigError(f"node {node} must follow an earlier node or -1, got {parent}")
        if self.scores and len(self.scores) != len(self.tokens):
            raise ConfigError(
                f"a tree needs one score a token or none, got {len(self.tokens)} tokens and "
                f"{len(self.scores)} scores"
            )
        for node, score in enumerate(self.scores):
            above = self.parents[node]
            if not 0 <= score <= (self.scores[above] if above >= 0 else 1):
                raise ConfigError(
                    f"node {node} has score {score}: a path is at most as probable as its beginning"
                )

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(cls, tokens: Sequence[int], scores: Sequence[float] = ()) -> TokenTree:
        return cls(tuple(tokens), tuple(range(-1, len(tokens) - 1)), tuple(scores))

    @property
    def depths(self) -> list[int]:
        """Of each node; 1 for a child of the sequence's last token."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    @property
    def steps(self) -> list[float]:
        """How probable the drafter finds each node, given that its parent is right; 1 if it has no
        scores."""
        if not self.scores:
            return [1.0] * len(self)
        above = (self.scores[parent] if parent >= 0 else 1.0 for parent in self.parents)
        return [s / a if a > 0 else 0.0 for s, a in zip(self.scores, above, strict=True)]

    @property
    def ranks(self) -> list[int]:
        """Of each node among its parent's children, most probable first, from 0."""
        seen: dict[int, int] = {}
        ranks = [0] * len(self)
        order = sorted(range(len(self)), key=lambda node: -self.scores[node] if self.scores else 0)
        for node in order:
            ranks[node] = seen.get(self.parents[node], 0)
            seen[self.parents[node]] = ranks[node] + 1
        return ranks

    @property
    def ancestors(self) -> Tensor:
        """[N, N], is m an ancestor of n, or n itself?"""
        reach = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                reach[node] |= reach[parent]
        return reach

    def paths(self) -> list[tuple[int, ...]]:
        """Tokens from below the sequence's last token down to each node, itself included."""
        paths: list[tuple[int, ...]] = []
        for token, parent in zip(self.tokens, self.parents, strict=True):
            paths.append((token,) if parent < 0 else (*paths[parent], token))
        return paths

    def best(self, num_nodes: int, by: Sequence[float] = ()) -> TokenTree:
        """The `num_nodes` most probable nodes, by its own scores or by others; of a tree without
        scores, the first ones. Each still stands behind its parent."""
        if num_nodes >= len(self):
            return self
        kept = list(range(len(self)))
        by = by or self.scores
        if by:  # a tie is for the earlier node, so a parent never loses to its child
            kept.sort(key=lambda node: -by[node])
        return self._pick(kept[:num_nodes])

    def that(self, may: Callable[[int], bool], most: int) -> TokenTree:
        """Of the nodes that may stand behind their parents, the `most` most probable ones, each
        behind its parent. `may` is asked for no more of them than that takes."""
        kept: set[int] = set()
        for node in sorted(range(len(self)), key=lambda n: -self.scores[n] if self.scores else 0):
            if len(kept) == most:
                break
            if (self.parents[node] < 0 or self.parents[node] in kept) and may(node):
                kept.add(node)
        return self if len(kept) == len(self) else self._pick(sorted(kept))

    def walk(self, chosen: Sequence[int]) -> tuple[list[int], list[int]]:
        """Follow the model down the tree. `chosen[0]` is the token it wants after the sequence's
        last token, `chosen[1 + i]` the one after node i. Returns the accepted nodes and the new
        tokens: theirs, then one that the tree did not hold (or whose node has no children)."""
        children = self._children()
        path: list[int] = []
        new = [chosen[0]]
        while (node := children.get((path[-1] if path else -1, new[-1]))) is not None:
            path.append(node)
            new.append(chosen[1 + node])
        return path, new

    def follow(self, tokens: Sequence[int]) -> list[int]:
        """The nodes that say these tokens, one below the other, as far as there are any."""
        children = self._children()
        path: list[int] = []
        for token in tokens:
            node = children.get((path[-1] if path else -1, token))
            if node is None:
                break
            path.append(node)
        return path

    def below(self, tokens: Sequence[int]) -> TokenTree:
        """What it holds behind these tokens; nothing, if it does not hold them. Scores are of the
        paths from there on."""
        if not tokens:
            return self
        path = self.follow(tokens)
        if len(path) < len(tokens):
            return TokenTree.empty
        root, kept = path[-1], []
        inside = {root}
        for node in range(root + 1, len(self)):
            if self.parents[node] in inside:
                inside.add(node)
                kept.append(node)
        return self._pick(kept, root)

    def top(self, depth: int) -> TokenTree:
        """Its first levels."""
        depths = self.depths
        if max(depths, default=0) <= depth:
            return self
        return self._pick([node for node in range(len(self)) if depths[node] <= depth])

    def deepest(self, accepted: Sequence[bool]) -> list[int]:
        """The longest path whose nodes are all accepted; of equal ones, the first."""
        best: list[int] = []
        paths: list[list[int] | None] = []
        for node, parent in enumerate(self.parents):
            above = [] if parent < 0 else paths[parent]
            path = None if above is None or not accepted[node] else [*above, node]
            paths.append(path)
            if path is not None and len(path) > len(best):
                best = path
        return best

    def _pick(self, kept: Sequence[int], root: int = -1) -> TokenTree:
        """Some nodes, each behind its parent, on top of this root."""
        place = {node: i for i, node in enumerate(kept)} | {root: -1}
        scores = tuple(self.scores[node] for node in kept) if self.scores else ()
        if root >= 0 and scores:
            above = self.scores[root]
            scores = tuple(score / above if above > 0 else 0.0 for score in scores)
        return TokenTree(
            tuple(self.tokens[node] for node in kept),
            tuple(place[self.parents[node]] for node in kept),
            scores,
        )

    def _children(self) -> dict[tuple[int, int], int]:
        """By parent and token."""
        pairs = zip(self.parents, self.tokens, strict=True)
        return {pair: node for node, pair in enumerate(pairs)}


TokenTree.empty = TokenTree((), ())


@dataclass(frozen=True, slots=True)
class Shape:
    """A tree whose form is fixed beforehand: node i is the `ranks[i]`-th guess, from 0, of those
    for its depth."""

    ranks: tuple[int, ...]
    parents: tuple[int, ...]

    @classmethod
    def chain(cls, depth: int) -> Shape:
        return cls((0,) * depth, tuple(range(-1, depth - 1)))

    @classmethod
    def sparse(cls, accuracies: Sequence[Sequence[float]], num_nodes: int) -> Shape:
        """Medusa's sparse tree (Cai et al., ICML 2024, 2.3.3): the nodes that are most often right,
        if guess r for depth d is right with probability `accuracies[d - 1][r]`, whatever stands
        before it."""
        ranks: list[int] = []
        parents: list[int] = []
        waiting: list[tuple[float, int, int, int]] = []  # probability, parent, rank, depth

        def offer(probability: float, parent: int, rank: int, depth: int) -> None:
            if depth <= len(accuracies) and rank < len(accuracies[depth - 1]):
                right = probability * accuracies[depth - 1][rank]
                heapq.heappush(waiting, (-right, parent, rank, depth))

        above = {-1: 1.0}
        offer(1.0, -1, 0, 1)
        while waiting and len(ranks) < num_nodes:
            negative, parent, rank, depth = heapq.heappop(waiting)
            node = len(ranks)
            ranks.append(rank)
            parents.append(parent)
            above[node] = -negative
            offer(above[parent], parent, rank + 1, depth)
            offer(above[node], node, 0, depth + 1)
        return cls(tuple(ranks), tuple(parents))

    def __len__(self) -> int:
        return len(self.ranks)

    def fill(
        self, guesses: Sequence[Sequence[int]], probabilities: Sequence[Sequence[float]]
    ) -> TokenTree:
        """The tree whose guesses for depth d are `guesses[d - 1]`, best first. Nodes that are
        deeper, or of a higher rank, than there are guesses are left out."""
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[float] = []
        place = {-1: -1}
        depths = {-1: 0}
        for node, (rank, parent) in enumerate(zip(self.ranks, self.parents, strict=True)):
            depths[node] = depths[parent] + 1
            level = depths[node] - 1
            if parent not in place or level >= len(guesses) or rank >= len(guesses[level]):
                continue
            place[node] = len(tokens)
            above = scores[place[parent]] if parent >= 0 else 1.0
            tokens.append(guesses[level][rank])
            parents.append(place[parent])
            scores.append(above * probabilities[level][rank])
        return TokenTree(tuple(tokens), tuple(parents), tuple(scores))
