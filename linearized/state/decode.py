"""Decode state of a linearized model. Knows tensors; knows nothing of tokens or requests.

L linearized layers, B rows (one sequence each), K key/value heads, F width of the features that go
into the memory, U value width, C hidden width. A row costs the same bytes whatever its length,
unless some layers keep softmax.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linearized.errors import StateError
from linearized.near import Near
from linearized.state import saved
from linearized.state.group import GroupState
from linearized.state.history import History

FILLED, STAMP = "history.filled", "stamp"
NOTES = (FILLED, STAMP)
"""Tensors that always lie on the CPU, and are not saved: they can be made again."""
BY_ROW = ("length", *NOTES)
"""Tensors of a state whose first dimension is the rows; of the others it is the second."""


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
        return self.layers.having(**{n: t[index] for n, t in stacked.items()}, length=length)

    def rows(self, start: int, stop: int) -> DecodeState:
        """Views of some neighbouring rows: whoever writes them writes this state."""
        part = replace(self, history=None)._map(
            lambda name, t: t[start:stop] if name in BY_ROW else t[:, start:stop]
        )
        if self.history is None:
            return part
        return replace(part, history=self.history.rows(start, stop))

    @torch.inference_mode(False)
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

    @torch.inference_mode(False)
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
        near = self.layers.near
        found: dict[str, tuple[int, ...]] = {"near": (near.group, near.window, near.sinks)}
        for name, tensor in self._tensors().items():
            grows = 3 if name.startswith("history") else None
            kept = (size for dim, size in enumerate(tensor.shape) if dim not in (1, grows))
            if name not in BY_ROW:
                found[name] = tuple(kept)
        return found

    def to_bytes(self, *, note: str = "") -> bytes:
        """As safetensors, for `from_bytes` on any machine. Equal states give equal bytes. `note`
        goes into their header."""
        held = {name: x for name, x in self._tensors().items() if name not in NOTES}
        tensors = {name: self._held(name, x).contiguous() for name, x in held.items()}
        return saved.write(tensors, self.fingerprint, self.layers.near, note)

    @staticmethod
    def note(blob: bytes) -> str:
        """What `to_bytes` was given for the header.

        Raises:
            StateError: the bytes are something else.
        """
        return saved.note(blob)

    @classmethod
    @torch.inference_mode(False)
    def from_bytes(cls, blob: bytes, device: torch.device | str = "cpu") -> DecodeState:
        """Read what `to_bytes` wrote.

        Raises:
            StateError: the bytes are something else, cut short, or of another version.
        """
        found, fingerprint, near = saved.read(blob)
        tensors = {name: tensor.to(device) for name, tensor in found.items()}
        if "history.keys" in tensors:
            tensors[FILLED] = tensors["length"].cpu().clone()
        tensors[STAMP] = new_stamps(len(tensors["length"]))
        return cls._of(tensors, fingerprint, near)

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
        return self._of(changed, self.fingerprint, self.layers.near)

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], fingerprint: str, near: Near) -> DecodeState:
        cross, shift = tensors.pop("cross", None), tensors.pop("shift", None)
        stamp = tensors.pop(STAMP, None)
        names = ("history.keys", "history.values", FILLED)
        keys, values, filled = (tensors.pop(name, None) for name in names)
        history = None if keys is None or values is None else History(keys, values, filled)
        layers = GroupState(**tensors, near=near)
        return cls(layers, fingerprint, history, cross, shift, stamp)


_stamps = itertools.count(1)


def new_stamps(rows: int) -> Tensor:
    """[B], numbers that no row has had so far in this process."""
    return torch.tensor([next(_stamps) for _ in range(rows)], dtype=torch.int64)
