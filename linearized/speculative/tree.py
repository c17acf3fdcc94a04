"""A draft: guesses at how a sequence goes on, as a tree. Knows token ids; knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from linearized.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TokenTree:
    """`parents[i]` is the node that `tokens[i]` follows: -1 for the sequence's last token, else a
    smaller index."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]

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

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> TokenTree:
        return cls(tuple(tokens), tuple(range(-1, len(tokens) - 1)))

    def walk(self, chosen: Sequence[int]) -> tuple[list[int], list[int]]:
        """Follow the model down the tree. `chosen[0]` is the token it wants after the sequence's
        last token, `chosen[1 + i]` the one after node i. Returns the accepted nodes and the new
        tokens: theirs, then one that the tree did not hold (or whose node has no children)."""
        children = {
            (p, t): n for n, (p, t) in enumerate(zip(self.parents, self.tokens, strict=True))
        }
        path: list[int] = []
        new = [chosen[0]]
        while (node := children.get((path[-1] if path else -1, new[-1]))) is not None:
            path.append(node)
            new.append(chosen[1 + node])
        return path, new


TokenTree.empty = TokenTree((), ())
