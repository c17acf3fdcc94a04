"""Guesses from the text itself: how it went on the last time. No weights."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from weakref import WeakKeyDictionary

from linearized.errors import ConfigError
from linearized.speculative.drafters.base import Ask, Drafter, check_sizes
from linearized.speculative.text import Text
from linearized.speculative.tree import TokenTree


class NgramDrafter(Drafter):
    """Looks for the last tokens earlier in prompt and text, longest first (Saxena, "Prompt Lookup
    Decoding", 2023)."""

    def __init__(self, *, depth: int = 8, longest: int = 4, shortest: int = 2) -> None:
        check_sizes(depth=depth, shortest=shortest, longest=longest)
        if longest < shortest:
            raise ConfigError(f"longest must be at least shortest={shortest}, got {longest}")
        self.depth = depth
        self.sizes = range(longest, shortest - 1, -1)
        self._indices: WeakKeyDictionary[Text, _Index] = WeakKeyDictionary()

    @property
    def identity(self) -> Hashable:
        return type(self), self.depth, self.sizes

    def propose(self, asks: Sequence[Ask]) -> list[TokenTree]:
        return [self._propose(ask) for ask in asks]

    def forget(self, text: Text) -> None:
        self._indices.pop(text, None)

    def _propose(self, ask: Ask) -> TokenTree:
        tokens = ask.text.tokens
        index = self._indices.setdefault(ask.text, _Index())
        index.read(tokens, self.sizes)
        length = min(ask.depth, ask.nodes, self.depth)
        for size in self.sizes:
            start = index.after.get(tuple(tokens[-size:]))
            if start is not None:
                return TokenTree.chain(tokens[start : start + length])
        return TokenTree.empty


class _Index:
    """Where each n-gram that something follows was last seen."""

    def __init__(self) -> None:
        self.num_read = 0
        self.after: dict[tuple[int, ...], int] = {}

    def read(self, tokens: Sequence[int], sizes: Sequence[int]) -> None:
        for end in range(max(self.num_read, 1), len(tokens)):
            for size in sizes:
                if size <= end:
                    self.after[tuple(tokens[end - size : end])] = end
        self.num_read = len(tokens)
