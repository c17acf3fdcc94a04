"""What a drafter foresees of one text: guesses that grow, the most probable first, and go on with
the text. Knows scores; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

from linearized.speculative.record import Record
from linearized.speculative.text import Text
from linearized.speculative.tree import TokenTree

FLOOR = 0.004
"""Guesses whose whole path is less likely right are left out."""
KEPT = 12
"""Guesses that a look adds, at most: breadth would leave no room for depth."""


class Foresight:
    """A tree on top of a text. `frontier` names the guesses to look behind, `add` takes what was
    seen there, and after the text has gone on, `go_on` keeps what was right, and learns of it how
    much the drafter's word is worth."""

    def __init__(self, text: Text, most: int, *, shared: Record | None = None) -> None:
        """`most`: guesses that it has room for. `shared`: what is known, and is to be known, of
        other texts' guesses as well."""
        self.text = text
        self.most = most
        self.length = len(text.tokens)
        """Tokens of the text on which it stands."""
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.scores: list[float] = []
        """How likely the paths are right: what the drafter says of them, as experience has it."""
        self._steps: list[float] = []
        """How probable the drafter finds each, given that its parent is right, …"""
        self._ranks: list[int] = []
        """… and whether it is the first that it would think of there."""
        self._depths: list[int] = []
        self._open: set[int] = {-1}
        """Nodes that nobody has looked behind."""
        self._looks = 0
        """Since the text's last token became the last."""
        self._final = False
        """It was made in one go, and is to be made anew when the text goes on."""
        self._shared = Record() if shared is None else shared
        self._own = Record()

    def go_on(self) -> bool:
        """Follow the text to where it is now. Says whether what it took up was foreseen."""
        new = self.text.tokens[self.length :]
        self.length = len(self.text.tokens)
        path = TokenTree(tuple(self.tokens), tuple(self.parents)).follow(new)
        if new and not self._final:
            for record in (self._shared, self._own):
                record.learn(self.parents, self._steps, self._ranks, path, len(new))
        if len(path) < len(new) or (new and self._final):
            self._clear()
            return False
        if new:
            self._root(path[-1])
        return True

    def frontier(self, depth: int, width: int) -> list[int]:
        """The most probable guesses, above that depth, that nobody has looked behind; -1 is the
        text's last token."""
        if len(self.tokens) >= self.most:
            return []
        known = [node for node in self._open if self._depth(node) < depth]
        return sorted(sorted(known), key=lambda node: -self._score(node))[:width]

    def seen(self, depth: int) -> bool:
        """Has it looked that far ahead, or as far as there was anything probable to see?"""
        return self._looks >= depth or not self.frontier(depth, 1)

    def above(self, nodes: Sequence[int]) -> list[int]:
        """These guesses and all on their paths, parents first."""
        wanted: set[int] = set()
        for node in nodes:
            while node >= 0 and node not in wanted:
                wanted.add(node)
                node = self.parents[node]
        return sorted(wanted)

    def path(self, node: int) -> tuple[int, ...]:
        """Tokens down to this guess."""
        tokens: list[int] = []
        while node >= 0:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tuple(reversed(tokens))

    def add(
        self, frontier: Sequence[int], guesses: Sequence[tuple[Sequence[float], Sequence[int]]]
    ) -> None:
        """Behind each of these nodes stand guesses: how probable, best first, and which tokens."""
        self._open.difference_update(frontier)
        self._looks += 1
        found = []
        for parent, (steps, tokens) in zip(frontier, guesses, strict=True):
            above = self._score(parent)
            for rank, (step, token) in enumerate(zip(steps, tokens, strict=True)):
                if not 0 < step <= 1:
                    break
                score = above * self._own.chance(step, rank, self._shared.chance(step, rank))
                if score >= FLOOR:
                    found.append((score, parent, step, rank, token))
        found.sort(key=lambda guess: -guess[0])
        for score, parent, step, rank, token in found[: min(KEPT, self.most - len(self.tokens))]:
            self._open.add(len(self.tokens))
            self.tokens.append(token)
            self.parents.append(parent)
            self.scores.append(score)
            self._steps.append(step)
            self._ranks.append(rank)
            self._depths.append(self._depth(parent) + 1)

    def replace(self, tree: TokenTree) -> None:
        """This is all that can be foreseen of the text as it is now."""
        self._clear()
        self._final = True
        self._open = set()
        self.tokens, self.parents = list(tree.tokens), list(tree.parents)
        self.scores = list(tree.scores) or [1.0] * len(tree)
        self._steps, self._ranks, self._depths = tree.steps, tree.ranks, tree.depths

    def close(self) -> None:
        """Nothing can be foreseen beyond this."""
        self._open = set()

    def tree(self) -> TokenTree:
        return TokenTree(tuple(self.tokens), tuple(self.parents), tuple(self.scores))

    def _clear(self) -> None:
        self.tokens, self.parents, self.scores = [], [], []
        self._steps, self._ranks, self._depths = [], [], []
        self._open, self._looks, self._final = {-1}, 0, False

    def _root(self, root: int) -> None:
        """Keep what stands behind this guess, which is the text's last token now."""
        place = {root: -1}
        kept: list[int] = []
        for node in range(root + 1, len(self.tokens)):
            if self.parents[node] in place:
                place[node] = len(kept)
                kept.append(node)
        score, depth = self._score(root), self._depth(root)
        self._open = {place[node] for node in self._open if node in place}
        self.parents = [place[self.parents[node]] for node in kept]
        self.tokens = [self.tokens[node] for node in kept]
        self.scores = [min(self.scores[node] / score, 1.0) for node in kept]
        self._steps = [self._steps[node] for node in kept]
        self._ranks = [self._ranks[node] for node in kept]
        self._depths = [self._depths[node] - depth for node in kept]
        self._looks = max(self._depths, default=0)

    def _score(self, node: int) -> float:
        return self.scores[node] if node >= 0 else 1.0

    def _depth(self, node: int) -> int:
        return self._depths[node] if node >= 0 else 0
