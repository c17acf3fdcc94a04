"""Token trees as tensors: what a step verifies. Knows tokens and parents; knows no keys, no state.

B batch, N tree nodes. A parent of -1 is the last committed token of a row; every other parent
stands before its child.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linearized.errors import ConfigError

BITS = 62
"""Nodes of a tree whose ancestors fit the bits of one integer."""


@dataclass(frozen=True, slots=True)
class Tree:
    """One token tree a row. Make it with `of` where tokens come from outside, with `chain` where
    they follow each other; whoever receives one need not check it again."""

    tokens: Tensor
    """[B, N]."""
    parents: Tensor
    """[B, N]."""
    visible: Tensor
    """[B, N, N], is node m an ancestor of node n, or n itself?"""

    @classmethod
    def of(cls, tokens: Tensor, parents: Tensor) -> Tree:
        """
        Raises:
            ConfigError: shapes that do not fit, or a node that stands before its parent.
        """
        check_parents(parents, *tokens.shape)
        return cls(tokens, parents, ancestors(parents))

    @classmethod
    def chain(cls, tokens: Tensor) -> Tree:
        """Tokens [B, T] that follow each other."""
        rows, num_tokens = tokens.shape
        parents = torch.arange(-1, num_tokens - 1, device=tokens.device).expand(rows, -1)
        visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=tokens.device).tril()
        return cls(tokens, parents, visible.expand(rows, -1, -1))

    @classmethod
    def side_by_side(
        cls, trees: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device
    ) -> Tree:
        """Trees of the host, as (tokens, parents), as wide as the widest: what is beyond a tree is
        its first token again, and nobody's parent. They are known to be trees, so nobody waits for
        a device to look."""
        widest = max(len(tokens) for tokens, _ in trees)
        tokens = [[*tokens, *[tokens[0]] * (widest - len(tokens))] for tokens, _ in trees]
        parents = [[*parents, *[-1] * (widest - len(parents))] for _, parents in trees]
        lines = torch.tensor(parents)
        found = cls(torch.tensor(tokens), lines, ancestors(lines))
        if device.type == "cpu":
            return found
        moved = (x.to(device, non_blocking=True) for x in (found.tokens, lines, found.visible))
        return cls(*moved)

    @property
    def shape(self) -> torch.Size:
        """[B, N]."""
        return self.tokens.shape


def ancestors(parents: Tensor) -> Tensor:
    """[B, N] parents to [B, N, N]: is m an ancestor of n, or n itself?"""
    num_nodes = parents.shape[1]
    if num_nodes == 1:
        return torch.ones(len(parents), 1, 1, dtype=torch.bool, device=parents.device)
    nodes = torch.arange(num_nodes, device=parents.device)
    if num_nodes <= BITS and parents.device.type == "cpu":
        return (_bits(parents.tolist())[:, :, None] >> nodes) % 2 > 0
    reach = (parents[:, :, None] == nodes) | (nodes[:, None] == nodes)
    for _ in range(max(num_nodes - 1, 1).bit_length()):  # paths of length 1, 2, 4, …
        reach = (reach.float() @ reach.float()) > 0
    return reach


def _bits(parents: list[list[int]]) -> Tensor:
    """[B, N], ancestors as the bits of an integer: quicker than matrices where trees are small."""
    rows = []
    for row in parents:
        bits: list[int] = []
        for node, parent in enumerate(row):
            bits.append(1 << node | (bits[parent] if parent >= 0 else 0))
        rows.append(bits)
    return torch.tensor(rows)


def check_parents(parents: Tensor, batch: int, num_nodes: int) -> None:
    """Raises ConfigError unless every parent stands before its child."""
    if parents.shape != (batch, num_nodes):
        raise ConfigError(
            f"parents must be [batch, nodes] = {[batch, num_nodes]}, got {list(parents.shape)}"
        )
    if parents.is_cuda:
        nodes = torch.arange(num_nodes, device=parents.device)
        right = not bool(((parents >= nodes) | (parents < -1)).any())
    else:  # quicker one by one
        right = all(-1 <= parent < i for row in parents.tolist() for i, parent in enumerate(row))
    if not right:
        raise ConfigError(
            "every tree node needs a parent that stands before it, or -1 for a child of the last "
            f"token, got parents {parents.tolist()}"
        )
