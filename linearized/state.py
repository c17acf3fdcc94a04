"""Decode state of a linearized model. Knows tensors; knows nothing of tokens or requests.

L linearized layers, B rows (one sequence each), K key/value heads, F width of the features that go
into the memory, X key width (of which the last F columns are the features), U value width, E width
of a head's own values (the last E columns of the U), G group size, M convolution taps. A row costs
the same bytes whatever its length, unless some layers keep softmax.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from linearized.errors import StateError

FORMAT = "linearized-state/2"
FILLED, STAMP = "history.filled", "stamp"
NOTES = (FILLED, STAMP)
"""Tensors that always lie on the CPU, and are not saved: they can be made again."""
BY_ROW = ("length", *NOTES)
"""Tensors of a state whose first dimension is the rows; of the others it is the second."""


@dataclass(frozen=True, slots=True)
class GroupState:
    """What linear attention remembers of the tokens so far, for one layer ([B, …]) or for all
    of them stacked ([L, B, …]). Slots that hold no token are zero, and so weigh nothing."""

    memory: Tensor
    """[…, K, F, U], Σ φ(k) vᵀ over closed groups; float32 at least."""
    keys: Tensor
    """[…, K, G, X], of the open group."""
    values: Tensor
    """[…, K, G, U], of the open group."""
    tail: Tensor
    """[…, K, M-1, E], the last values in order of time, for the convolution."""
    length: Tensor
    """[B], int64, tokens folded in so far."""

    @classmethod
    def empty(
        cls,
        *leading: int,
        heads: int,
        features: int,
        key_width: int,
        value_width: int,
        tail_width: int,
        group: int,
        taps: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> GroupState:
        """Zeros; `leading` is (B,) or (L, B)."""

        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*leading, heads, *shape, dtype=of, device=device)

        return cls(
            memory=zeros(features, value_width, of=torch.promote_types(dtype, torch.float32)),
            keys=zeros(group, key_width),
            values=zeros(group, value_width),
            tail=zeros(taps - 1, tail_width),
            length=torch.zeros(leading[-1], dtype=torch.int64, device=device),
        )

    @classmethod
    def none(
        cls, rows: int, *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> GroupState:
        """Of a model without linear layers: lengths."""
        return cls.empty(
            0, rows, heads=1, features=0, key_width=0, value_width=0, tail_width=0, group=1, taps=1,
            dtype=dtype, device=device,
        )  # fmt: skip

    @property
    def group(self) -> int:
        return self.keys.shape[-2]

    @property
    def taps(self) -> int:
        return self.tail.shape[-2] + 1

    @property
    def stacked(self) -> GroupState:
        """This state as [L, B, …], views of the same tensors: of one layer, if it is one's."""
        if self.memory.ndim == 5:
            return self
        memory, keys, values, tail = self.memory, self.keys, self.values, self.tail
        return GroupState(memory[None], keys[None], values[None], tail[None], self.length)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "memory": self.memory,
            "keys": self.keys,
            "values": self.values,
            "tail": self.tail,
            "length": self.length,
        }

    def clone(self) -> GroupState:
        return GroupState(**{name: tensor.clone() for name, tensor in self.tensors().items()})


PAGE = 256
"""Tokens by which the room of a history grows."""
GROWTH = 16 * PAGE
"""Tokens at most that room is made for before they are there."""


@dataclass(slots=True)
class History:
    """Keys and values of the layers that keep softmax: the part of a hybrid's state that grows.
    Row b holds `DecodeState.length[b]` tokens; what lies beyond them means nothing. Its room is
    some whole pages, and whoever reads it masks by length."""

    keys: Tensor
    """[S, B, K, C, D], for S softmax layers, with room for C tokens."""
    values: Tensor
    """[S, B, K, C, E]."""
    filled: Tensor | None = None
    """[B], int64, on the CPU: at least as many tokens as each row holds, known without asking a
    GPU. None: all of the room is looked at."""

    @classmethod
    def empty(
        cls,
        layers: int,
        rows: int,
        heads: int,
        key_width: int,
        value_width: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> History:
        """Without any room."""
        shape = (layers, rows, heads, 0)
        return cls(
            torch.zeros(*shape, key_width, dtype=dtype, device=device),
            torch.zeros(*shape, value_width, dtype=dtype, device=device),
            torch.zeros(rows, dtype=torch.int64),
        )

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def bytes_at(self, num_tokens: int) -> int:
        """What it takes when the longest row has so many tokens."""
        layers, rows, heads, _, width = self.keys.shape
        each = layers * rows * heads * (width + self.values.shape[4]) * self.keys.itemsize
        return _pages(num_tokens) * each

    @property
    def room(self) -> int:
        """C."""
        return self.keys.shape[3]

    @property
    def size(self) -> int:
        """Tokens that have to be looked at: those of the longest row, rounded up to pages."""
        if self.filled is None:
            return self.room
        longest = int(self.filled.max()) if len(self.filled) else 0
        return min(_pages(longest), self.room)

    def layer(self, slot: int) -> tuple[Tensor, Tensor]:
        """Keys [B, K, C', D] and values [B, K, C', E] of one layer, as far as any row has some."""
        size = self.size
        return self.keys[slot, :, :, :size], self.values[slot, :, :, :size]

    def view(self) -> History:
        """The same, without the pages that no row has reached."""
        size = self.size
        return History(self.keys[:, :, :, :size], self.values[:, :, :, :size], self.filled)

    def copy_(self, other: History) -> None:
        """What another of as many rows holds."""
        assert self.filled is not None and other.filled is not None
        size, before = other.size, self.size
        self.reserve(size)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[:, :, :, :size].copy_(theirs[:, :, :, :size])
            mine[:, :, :, size:before].zero_()  # a number that is none would still be one
        self.filled.copy_(other.filled)

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        length: Tensor,
        mask: Tensor | None,
        counts: Sequence[int] | None = None,
    ) -> None:
        """Add [S, B, K, T, ·] after each row's `length` [B], those that `mask` [B, T] keeps.
        `counts` [B] says how many these are, where it is known."""
        assert self.filled is not None
        num_tokens = keys.shape[3]
        if counts is None and mask is not None and not mask.is_cuda:
            counts = mask.sum(1).tolist()
        added = torch.tensor(counts) if counts is not None else num_tokens
        needed = int(self.filled.max()) + num_tokens + (mask is not None)
        if needed > self.room:  # and some more, so that a growing text is not copied page by page
            self.reserve(max(needed, min(2 * self.room, self.room + GROWTH)))
        ranks = torch.arange(num_tokens, device=length.device).expand(len(length), -1)
        if mask is not None:
            ranks = mask.long().cumsum(1) - 1
        slots = length[:, None] + ranks  # B T
        if mask is not None:  # what is left out goes to the last place, which no row has reached
            slots = torch.where(mask.bool(), slots, self.room - 1)
        for whole, new in ((self.keys, keys), (self.values, values)):
            index = slots[None, :, None, :, None].expand_as(new)
            whole.scatter_(3, index, new.to(whole.dtype))
        self.filled += added

    def reserve(self, size: int) -> None:
        """Make room for this many tokens, in whole pages."""
        more = _pages(size) - self.room
        if more > 0:
            self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))


def _pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE) * PAGE


@dataclass(frozen=True, slots=True)
class DecodeState:
    """The state of B sequences in every layer. Tensors are allocated once and written in place,
    by `commit` and `extend` only; only a hybrid's `history` grows."""

    layers: GroupState
    """Stacked: every tensor but `length` is [L, B, …]."""
    fingerprint: str
    """Of the model it belongs to; a state is refused by any other."""
    history: History | None = None
    """Of the layers that keep softmax, where there are any."""
    cross: Tensor | None = None
    """[L, B, K, F, U], what the decoder of an encoder-decoder model knows of the encoder's text."""
    shift: Tensor | None = None
    """[L, B, C], what the last token hands to the next one where a model shifts channels by a
    token."""
    stamp: Tensor | None = None
    """[B], int64, on the CPU: another number after every write, the same in every copy. So equal
    stamps tell equal rows without looking at them."""

    @property
    def length(self) -> Tensor:
        """[B], tokens folded in so far."""
        return self.layers.length

    @property
    def batch_size(self) -> int:
        return self.layers.length.shape[0]

    @property
    def num_layers(self) -> int:
        """Linearized layers."""
        return self.layers.memory.shape[0]

    @property
    def nbytes(self) -> int:
        """Constant, but for a hybrid's: there it grows with the text."""
        return sum(x.nbytes for name, x in self._tensors().items() if name not in NOTES)

    def written(self) -> None:
        """Tell that rows have been written."""
        if self.stamp is not None:
            self.stamp.copy_(new_stamps(self.batch_size))

    def layer(self, index: int) -> GroupState:
        """Views of one linearized layer's tensors, [B, …]."""
        stacked = self.layers.tensors()
        length = stacked.pop("length")
        return GroupState(**{name: t[index] for name, t in stacked.items()}, length=length)

    def rows(self, start: int, stop: int) -> DecodeState:
        """Views of some neighbouring rows: who writes them writes this state. (Not so where a
        hybrid's history grows: make room for it first.)"""
        return self._map(lambda name, t: t[start:stop] if name in BY_ROW else t[:, start:stop])

    def clone(self) -> DecodeState:
        """A copy, without a history's room for further tokens."""
        viewed = self if self.history is None else replace(self, history=self.history.view())
        return viewed._map(lambda name, tensor: tensor.clone())

    def copy_(self, other: DecodeState) -> None:
        """Overwrite this state with another of the same model and batch size."""
        self.check(other.fingerprint)
        if other.batch_size != self.batch_size:
            raise StateError(
                f"cannot copy a state of {other.batch_size} rows into one of {self.batch_size}"
            )
        mine, theirs = self.layers.tensors(), other.layers.tensors()
        for name, target in mine.items():
            target.copy_(theirs[name])
        if self.stamp is not None and other.stamp is not None:
            self.stamp.copy_(other.stamp)
        if self.cross is not None and other.cross is not None:
            self.cross.copy_(other.cross)
        if self.shift is not None and other.shift is not None:
            self.shift.copy_(other.shift)
        if self.history is not None and other.history is not None:
            self.history.copy_(other.history)

    def select(self, rows: Sequence[int]) -> DecodeState:
        """A new state with copies of these rows, in this order."""
        index = torch.tensor(list(rows), dtype=torch.int64)

        def picked(name: str, tensor: Tensor) -> Tensor:
            return tensor.index_select(0 if name in BY_ROW else 1, index.to(tensor.device))

        return self._map(picked)

    def check(self, fingerprint: str) -> None:
        if fingerprint != self.fingerprint:
            raise StateError(
                f"this decode state belongs to model {self.fingerprint}, not to {fingerprint}; "
                "make a new one with linearized.new_state(model, batch_size=…) and extend it with "
                "the sequence's tokens"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its tensors, but for rows and the room of a history: the same for all states of a
        model."""
        found = {}
        for name, tensor in self._tensors().items():
            grows = 3 if name.startswith("history") else None
            kept = (size for dim, size in enumerate(tensor.shape) if dim not in (1, grows))
            if name not in BY_ROW:
                found[name] = tuple(kept)
        return found

    def to_bytes(self) -> bytes:
        """As safetensors, for `from_bytes` on any machine. Equal states give equal bytes."""
        held = {name: x for name, x in self._tensors().items() if name not in NOTES}
        tensors = {name: self._held(name, x).contiguous() for name, x in held.items()}
        metadata = {"format": FORMAT, "fingerprint": self.fingerprint}
        return _in_order(safetensors.torch.save(tensors, metadata=metadata))

    @classmethod
    def from_bytes(cls, blob: bytes, device: torch.device | str = "cpu") -> DecodeState:
        """Read what `to_bytes` wrote.

        Raises:
            StateError: the bytes are something else, cut short, or of another version.
        """
        metadata = _metadata(blob)
        if metadata.get("format") != FORMAT:
            raise StateError(
                f"not a decode state of this version: format {metadata.get('format')!r}, "
                f"expected {FORMAT!r}"
            )
        try:
            tensors = safetensors.torch.load(blob)
        except (safetensors.SafetensorError, ValueError) as error:
            raise StateError(f"damaged decode state: {error}") from error
        names = {field.name for field in fields(GroupState)}
        optional = {"history.keys", "history.values", "cross", "shift"}
        known = names <= set(tensors) <= names | optional
        halved = ("history.keys" in tensors) != ("history.values" in tensors)
        if not known or halved or "fingerprint" not in metadata:
            raise StateError(f"damaged decode state: it holds {', '.join(sorted(tensors))}")
        _check_shapes(tensors)
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        if "history.keys" in tensors:
            tensors[FILLED] = tensors["length"].cpu().clone()
        tensors[STAMP] = new_stamps(len(tensors["length"]))
        return cls._of(tensors, metadata["fingerprint"])

    def _tensors(self) -> dict[str, Tensor]:
        tensors = self.layers.tensors()
        if self.history is not None:
            tensors["history.keys"] = self.history.keys
            tensors["history.values"] = self.history.values
            if self.history.filled is not None:
                tensors[FILLED] = self.history.filled
        if self.cross is not None:
            tensors["cross"] = self.cross
        if self.shift is not None:
            tensors["shift"] = self.shift
        if self.stamp is not None:
            tensors[STAMP] = self.stamp
        return tensors

    def _held(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor without what means nothing: a history's room beyond each row's tokens."""
        if not name.startswith("history"):
            return tensor
        slots = torch.arange(int(self.length.max()), device=tensor.device)
        beyond = (slots >= self.length[:, None])[None, :, None, :, None]
        return tensor[:, :, :, : len(slots)].masked_fill(beyond, 0)

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> DecodeState:
        changed = {name: change(name, tensor) for name, tensor in self._tensors().items()}
        return self._of(changed, self.fingerprint)

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], fingerprint: str) -> DecodeState:
        cross, shift = tensors.pop("cross", None), tensors.pop("shift", None)
        stamp = tensors.pop(STAMP, None)
        names = ("history.keys", "history.values", FILLED)
        parts = [tensors.pop(name) for name in names if name in tensors]
        history = History(*parts) if parts else None
        return cls(GroupState(**tensors), fingerprint, history, cross, shift, stamp)


_stamps = itertools.count(1)


def new_stamps(rows: int) -> Tensor:
    """[B], numbers that no row has had so far in this process."""
    return torch.tensor([next(_stamps) for _ in range(rows)], dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Fresh:
    """Keys and values of new tokens, or of tree nodes: what a forward leaves and a state takes
    in."""

    layers: tuple[Tensor, Tensor]
    """Keys [L, B, K, T, X] and values [L, B, K, T, U] of the linearized layers."""
    history: tuple[Tensor, Tensor] | None = None
    """[S, B, K, T, D] and [S, B, K, T, E] of the layers that keep softmax, where there are any."""
    shift: Tensor | None = None
    """[L, B, T, C], where a model shifts channels by a token."""
    backend: str | None = None
    """Who folds them in; None: the library chooses."""

    def rows(self, start: int, stop: int) -> Fresh:
        """Views of some neighbouring rows."""
        return self._map(lambda tensor: tensor[:, start:stop])

    def first(self, count: int) -> Fresh:
        """Views of the first tokens."""
        return self._map(lambda tensor: tensor[:, :, :, :count])

    def at(self, index: Tensor) -> Fresh:
        """Tokens `index` [B, J] of each row."""
        if len(index) == 1 and self.layers[0].numel():
            return self._map(lambda tensor: tensor.index_select(3, index[0]))

        def picked(tensor: Tensor) -> Tensor:
            along = index[None, :, None, :, None]
            return tensor.gather(3, along.expand(*tensor.shape[:3], -1, tensor.shape[4]))

        return self._map(picked)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Fresh:
        """Of tensors [L, B, K, T, ·]."""
        keys, values = map(change, self.layers)
        history, shift = self.history, self.shift
        if history is not None:
            history = (change(history[0]), change(history[1]))
        if shift is not None:
            shift = change(shift[:, :, None])[:, :, 0]
        return Fresh((keys, values), history, shift, self.backend)


@dataclass(frozen=True, slots=True)
class Pending:
    """What verified tree nodes would add to the state that they were verified against: nothing
    yet."""

    fresh: Fresh
    parents: Tensor
    """[B, N], -1: child of the last committed token."""
    stamp: Tensor | None
    """[B], of the state that the nodes were verified against."""
    hidden: Tensor | None = None
    """[B, N, C], of the last layer, where it was asked for."""

    @classmethod
    def of(
        cls, fresh: Fresh, parents: Tensor, state: DecodeState, hidden: Tensor | None = None
    ) -> Pending:
        stamp = None if state.stamp is None else state.stamp.clone()
        return cls(fresh, parents, stamp, hidden)

    def check(self, path: Sequence[Sequence[int]], state: DecodeState) -> None:
        """Raises StateError unless `path` walks down each row's tree from the last committed
        token and the state is what was verified against, or a copy of it."""
        if len(path) != state.batch_size:
            raise StateError(f"one path a row: {state.batch_size} rows, got {len(path)} paths")
        known = self.stamp is not None and state.stamp is not None
        if known and not torch.equal(cast(Tensor, self.stamp), cast(Tensor, state.stamp)):
            raise StateError(
                "these nodes were verified against another state, or this one has moved on since: "
                "verify again before committing"
            )
        for row, (nodes, parents) in enumerate(zip(path, self.parents.tolist(), strict=True)):
            last = -1
            for node in nodes:
                if not 0 <= node < len(parents) or parents[node] != last:
                    raise StateError(
                        f"row {row}: {list(nodes)} is no path from the last committed token down "
                        f"a tree with parents {parents}"
                    )
                last = node


def _check_shapes(tensors: dict[str, Tensor]) -> None:
    """Raises StateError unless the tensors of a state fit each other."""

    def fits(ok: bool, name: str) -> None:
        if not ok:
            tensor = tensors[name]
            raise StateError(
                f"damaged decode state: {name} is {tensor.dtype}, {list(tensor.shape)}, which does "
                "not fit the rest of it"
            )

    length = tensors["length"]
    fits(length.ndim == 1 and length.dtype == torch.int64 and bool((length >= 0).all()), "length")
    kind = tensors["keys"].dtype
    for name, tensor in tensors.items():
        if name == "length":
            continue
        wanted = torch.promote_types(kind, torch.float32) if name == "memory" else kind
        if name != "cross":
            fits(tensor.dtype == wanted, name)
        fits(tensor.is_floating_point(), name)
        fits(tensor.ndim == (3 if name == "shift" else 5), name)
        fits(tensor.shape[1] == len(length), name)
    memory, keys, values, tail = (tensors[n].shape for n in ("memory", "keys", "values", "tail"))
    fits(keys[:4] == values[:4], "values")
    fits(memory[:3] == keys[:3] and memory[3] <= keys[4] and memory[4] == values[4], "memory")
    fits(tail[:3] == keys[:3] and tail[4] <= values[4], "tail")
    if "history.keys" in tensors:
        fits(tensors["history.keys"].shape[:4] == tensors["history.values"].shape[:4],
             "history.values")  # fmt: skip
        longest = int(length.max()) if len(length) else 0
        fits(tensors["history.keys"].shape[3] >= longest, "history.keys")


def _in_order(blob: bytes) -> bytes:
    """The same safetensors with a sorted header: safetensors writes metadata in an order that
    changes from call to call."""
    size = int.from_bytes(blob[:8], "little")
    entries = json.loads(blob[8 : 8 + size])
    header = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8 bytes
    return b"".join([len(header).to_bytes(8, "little"), header, blob[8 + size :]])


def _metadata(blob: bytes) -> dict[str, str]:
    """The header's metadata: safetensors reads it from files only, so the (documented) layout,
    an 8-byte length and then JSON, is read here."""
    try:
        size = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + size])
        return dict(header.get("__metadata__", {}))
    except (ValueError, AttributeError, TypeError) as error:
        raise StateError("not a decode state: it does not begin as safetensors do") from error
