"""States of texts that were read before, for other texts to go on from. Knows token ids and
states; knows no model and no text in the making.

The known texts of each owner are a radix tree: an edge is a run of tokens, and a node may hold a
snapshot, the state behind all tokens down to it. Snapshots of linear layers are alike in size,
whatever their length. Where some layers keep softmax, the keys and values of an edge's tokens lie
with the edge, so that snapshots of texts that begin alike share them.

S softmax layers, K key/value heads, T tokens, D and E widths of keys and values.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from linearized.config import is_whole
from linearized.errors import ConfigError, StateError
from linearized.state import DecodeState, History

EVERY = 1024
"""Tokens of a prompt after which the next snapshot is taken."""
SPARED = 8
"""Tokens that a snapshot must spare to be worth an interruption of a prompt."""

Ids = NDArray[np.int32]
Rows = tuple[Tensor, Tensor]
"""Keys [S, 1, K, T, D] and values [S, 1, K, T, E]."""


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a text."""

    length: int = 0
    """Its first tokens that `state` has read."""
    state: DecodeState | None = None
    """Copy it, never write it. None: nothing is known."""
    known: int = 0
    """Its first tokens that some known text has, too; at least `length`."""


@dataclass(slots=True, eq=False)
class _Node:
    ids: Ids
    """Of the edge that leads here."""
    parent: _Node | None = None
    rows: list[Rows] = field(default_factory=list)
    """Of the layers that keep softmax, for the tokens of the edge, one after the other."""
    state: DecodeState | None = None
    """Behind the last of these tokens, without a history; None: there is no snapshot."""
    children: dict[int, _Node] = field(default_factory=dict)
    """By their first tokens."""

    @property
    def nbytes(self) -> int:
        """Of the edge."""
        return self.ids.nbytes + sum(keys.nbytes + values.nbytes for keys, values in self.rows)

    def path(self) -> Iterator[_Node]:
        """From here up to below the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class Prefixes:
    """Snapshots for one model, in at most `max_bytes`; those that were used least recently go
    first. An engine that was given it adds to it and goes on from it. Other threads may read it,
    and add to it, meanwhile."""

    def __init__(self, max_bytes: int, *, every: int = EVERY) -> None:
        """`every`: so many tokens of a prompt apart snapshots are taken, besides those at its end,
        at the end of its answer, and where it leaves a known text.

        Raises:
            ConfigError: a number below 1.
        """
        for name, value in (("max_bytes", max_bytes), ("every", every)):
            if not is_whole(value) or value < 1:
                raise ConfigError(f"{name} must be at least 1, and whole, got {value!r}")
        self.max_bytes = int(max_bytes)
        self.every = int(every)
        self._like: DecodeState | None = None
        """An empty state of the model."""
        self._roots: dict[str, _Node] = {}
        """By owner."""
        self._recent: dict[_Node, None] = {}
        """Nodes with snapshots, the least recently used first."""
        self._nbytes = 0
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """What snapshots and their tokens take now."""
        return self._nbytes

    def __len__(self) -> int:
        """Snapshots."""
        return len(self._recent)

    def join(self, like: DecodeState) -> None:
        """Snapshots are of the model that `like` is a state of, from now on.

        Raises:
            ConfigError: they are of another.
        """
        if self._like is None:
            self._like = like
        elif _kind(self._like) != _kind(like):
            raise ConfigError(
                f"these prefixes belong to model {self._like.fingerprint} in {_dtype(self._like)}, "
                f"not to {like.fingerprint} in {_dtype(like)}; give each model its own"
            )

    def find(self, tokens: Sequence[int], *, owner: str = "") -> Found:
        """The longest known prefix of a text, among what this owner's texts have left."""
        ids = _ids(tokens)
        with self._lock:
            if owner not in self._roots:
                return Found()
            length, found, depth = 0, None, 0
            for node, common in self._walk(self._roots[owner], ids):
                depth += common
                if node.state is not None and common == len(node.ids):
                    length, found = depth, node
            if found is None:
                return Found(known=depth)
            self._touch(found)
            return Found(length, self._state(found, length), depth)

    def put(self, tokens: Sequence[int], state: DecodeState, *, owner: str = "") -> bool:
        """Keep a copy of a state [1 row] that has read these tokens. False: it is larger than all
        that may be kept.

        Raises:
            StateError: it is another model's, or has read another number of tokens.
        """
        self._check(state)
        ids = _ids(tokens)
        length = state.length.tolist()
        if length != [len(ids)]:
            raise StateError(f"a state that has read {length} is none of {len(ids)} tokens")
        if not len(ids) or _size(state, len(ids)) > self.max_bytes:
            return False
        with self._lock:
            self._insert(ids, state, owner)
            while self._nbytes > self.max_bytes:
                self._evict(next(iter(self._recent)))
        return True

    def export(self, tokens: Sequence[int], *, owner: str = "") -> bytes | None:
        """The longest known prefix of a text, as bytes that `load` takes in anywhere (safetensors).
        None: nothing is known."""
        found = self.find(tokens, owner=owner)
        if found.state is None:
            return None
        return found.state.to_bytes(note=_digest(_ids(tokens)[: found.length]))

    def load(self, blob: bytes, tokens: Sequence[int], *, owner: str = "") -> int:
        """Take in what `export` gave for this text, or for one that begins alike. Returns how many
        of its tokens it spares; 0: it does not fit here.

        Raises:
            StateError: the bytes are something else, of another model, or of another text.
        """
        like = self._model_state()
        state = DecodeState.from_bytes(blob, device=like.length.device)
        self._check(state)
        ids = _ids(tokens)[: int(state.length[0])] if state.batch_size == 1 else _ids(())
        if DecodeState.note(blob) != _digest(ids):
            raise StateError(f"these bytes are no state behind the first {len(ids)} of the tokens")
        return len(ids) if self.put(tokens[: len(ids)], state, owner=owner) else 0

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._roots.clear()
            self._recent.clear()
            self._nbytes = 0

    def _check(self, state: DecodeState) -> None:
        """
        Raises:
            StateError: it is another model's.
        """
        like = self._model_state()
        like.check(state.fingerprint)
        if _kind(state) != _kind(like):
            raise StateError(
                f"damaged decode state: its tensors are {state.shapes()} in {_dtype(state)}, not "
                f"{like.shapes()} in {_dtype(like)}"
            )

    def _model_state(self) -> DecodeState:
        if self._like is None:
            raise ConfigError("no engine has these prefixes yet; make one with prefixes=…")
        return self._like

    def _walk(self, root: _Node, ids: Ids) -> Iterator[tuple[_Node, int]]:
        """Down the tree along these tokens: each node, and how many tokens of its edge are theirs;
        of the last one maybe not all."""
        node, depth = root, 0
        while depth < len(ids) and int(ids[depth]) in node.children:
            node = node.children[int(ids[depth])]
            common = _common(node.ids, ids[depth:])
            yield node, common
            if common < len(node.ids):
                return
            depth += common

    def _state(self, node: _Node, length: int) -> DecodeState:
        """With the history that lies along the path."""
        assert node.state is not None
        rows = [pair for one in reversed(list(node.path())) for pair in one.rows]
        if not rows:
            return node.state
        keys, values = (torch.cat(part, dim=3) for part in zip(*rows, strict=True))
        return replace(node.state, history=History(keys, values, torch.tensor([length])))

    def _insert(self, ids: Ids, state: DecodeState, owner: str) -> None:
        root = self._roots.get(owner) or _Node(_ids(()))
        steps = [(root, 0), *self._walk(root, ids)]
        node, common = steps[-1]
        depth = sum(count for _, count in steps)
        if depth < len(ids) or common < len(node.ids) or node.state is None:
            # All that may fail for want of memory comes before the tree is changed.
            rows = _rows(state, depth, len(ids))
            kept = replace(state, history=None).clone()
            if common < len(node.ids):
                node = self._split(node, common)
            if depth < len(ids):
                leaf = _Node(ids[depth:].copy(), node, rows)
                node.children[int(ids[depth])] = leaf
                self._nbytes += leaf.nbytes
                node = leaf
            node.state = kept
            self._nbytes += kept.nbytes
            self._roots[owner] = root
        self._touch(node)

    def _split(self, node: _Node, count: int) -> _Node:
        """A node behind the first so many tokens of an edge. Returns it."""
        assert node.parent is not None
        first, rest = _cut(node.rows, count)
        above = _Node(node.ids[:count].copy(), node.parent, first)
        node.parent.children[int(node.ids[0])] = above
        node.ids, node.rows, node.parent = node.ids[count:].copy(), rest, above
        above.children[int(node.ids[0])] = node
        return above

    def _touch(self, node: _Node) -> None:
        self._recent.pop(node, None)
        self._recent[node] = None

    def _evict(self, node: _Node) -> None:
        """A snapshot goes, and with it what no other needs of the texts."""
        assert node.state is not None
        del self._recent[node]
        self._nbytes -= node.state.nbytes
        node.state = None
        while node.parent is not None and node.state is None and not node.children:
            self._nbytes -= node.nbytes
            del node.parent.children[int(node.ids[0])]
            node = node.parent
        if node.parent is None:
            if not node.children:
                self._roots = {name: root for name, root in self._roots.items() if root is not node}
        elif node.state is None and len(node.children) == 1:
            (child,) = node.children.values()
            child.ids = np.concatenate([node.ids, child.ids])
            child.rows = [*node.rows, *child.rows]
            child.parent = node.parent
            node.parent.children[int(child.ids[0])] = child


def _ids(tokens: Sequence[int]) -> Ids:
    return np.asarray(array("i", tokens), dtype=np.int32)


def _common(one: Ids, other: Ids) -> int:
    """How many tokens they begin with alike."""
    size = min(len(one), len(other))
    differ = one[:size] != other[:size]
    first = int(differ.argmax()) if size else 0
    return first if size and differ[first] else size


def _digest(ids: Ids) -> str:
    return hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=16).hexdigest()


def _dtype(state: DecodeState) -> torch.dtype:
    return state.layers.keys.dtype


def _kind(state: DecodeState) -> tuple[object, ...]:
    return state.fingerprint, _dtype(state), state.shapes()


def _rows(state: DecodeState, start: int, stop: int) -> list[Rows]:
    """Copies, of the layers that keep softmax."""
    history = state.history
    if history is None or start == stop:
        return []
    part = (slice(None), slice(None), slice(None), slice(start, stop))
    return [(history.keys[part].clone(), history.values[part].clone())]


def _cut(rows: Sequence[Rows], count: int) -> tuple[list[Rows], list[Rows]]:
    """Those of the first so many tokens, and the others; copies where a run is cut in two, so that
    each can go without the other."""
    first: list[Rows] = []
    rest: list[Rows] = []
    for keys, values in rows:
        size = keys.shape[3]
        if count >= size:
            first.append((keys, values))
        elif count <= 0:
            rest.append((keys, values))
        else:
            parts = [tensor.split([count, size - count], dim=3) for tensor in (keys, values)]
            first.append((parts[0][0].clone(), parts[1][0].clone()))
            rest.append((parts[0][1].clone(), parts[1][1].clone()))
        count -= size
    return first, rest


def _size(state: DecodeState, length: int) -> int:
    """What it takes where nothing is shared."""
    size, history = state.nbytes + 4 * length, state.history
    if history is not None and history.room:
        size += history.nbytes // history.room * (length - history.room)
    return size
