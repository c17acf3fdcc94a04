"""Decode state of a linearized model. Knows tensors; knows nothing of tokens or requests.

L layers, B rows (one sequence each), H key/value heads, D key width, E value width, G group size,
M convolution taps. A row costs the same bytes whatever its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from linearized.errors import StateError

FORMAT = "linearized-state/1"


@dataclass(frozen=True, slots=True)
class GroupState:
    """What grouped attention remembers of the tokens so far, for one layer ([B, …]) or for all
    of them stacked ([L, B, …]). Slots that hold no token are zero, and so weigh nothing."""

    memory: Tensor
    """[…, H, D, E], Σ k̂ vᵀ over closed groups; float32 at least."""
    keys: Tensor
    """[…, H, G, D], the open group's unit keys."""
    values: Tensor
    """[…, H, G, E], the open group's values."""
    tail: Tensor
    """[…, H, M-1, E], the last values in order of time, for the convolution."""
    length: Tensor
    """[B], int64, tokens folded in so far."""

    @classmethod
    def empty(
        cls,
        *leading: int,
        heads: int,
        key_width: int,
        value_width: int,
        group: int,
        taps: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> GroupState:
        """Zeros; `leading` is (B,) or (L, B)."""

        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*leading, heads, *shape, dtype=of, device=device)

        return cls(
            memory=zeros(key_width, value_width, of=torch.promote_types(dtype, torch.float32)),
            keys=zeros(group, key_width),
            values=zeros(group, value_width),
            tail=zeros(taps - 1, value_width),
            length=torch.zeros(leading[-1], dtype=torch.int64, device=device),
        )

    @property
    def group(self) -> int:
        return self.keys.shape[-2]

    @property
    def taps(self) -> int:
        return self.tail.shape[-2] + 1

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class DecodeState:
    """The state of B sequences in every layer. Tensors are allocated once and written in place,
    by `commit` and `extend` only."""

    layers: GroupState
    """Stacked: every tensor but `length` is [L, B, …]."""
    fingerprint: str
    """Of the model it belongs to; a state is refused by any other."""

    @property
    def length(self) -> Tensor:
        """[B], tokens folded in so far."""
        return self.layers.length

    @property
    def batch_size(self) -> int:
        return self.layers.length.shape[0]

    @property
    def num_layers(self) -> int:
        return self.layers.memory.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.layers.tensors().values())

    def layer(self, index: int) -> GroupState:
        """Views of one layer's tensors, [B, …]."""
        stacked = self.layers.tensors()
        length = stacked.pop("length")
        return GroupState(**{name: t[index] for name, t in stacked.items()}, length=length)

    def flat(self) -> GroupState:
        """All layers as rows, [L·B, …], so that one call folds them all."""
        stacked = self.layers.tensors()
        length = stacked.pop("length").repeat(self.num_layers)
        return GroupState(**{name: t.flatten(0, 1) for name, t in stacked.items()}, length=length)

    def write(self, flat: GroupState) -> None:
        """Replace everything, in place, by what `flat` ([L·B, …]) holds."""
        for name, target in self.layers.tensors().items():
            source: Tensor = getattr(flat, name)
            target.copy_(source[: self.batch_size] if name == "length" else source.view_as(target))

    def clone(self) -> DecodeState:
        copies = {name: tensor.clone() for name, tensor in self.layers.tensors().items()}
        return replace(self, layers=GroupState(**copies))

    def copy_(self, other: DecodeState) -> None:
        """Overwrite this state with another of the same model and batch size."""
        self.check(other.fingerprint)
        if other.batch_size != self.batch_size:
            raise StateError(
                f"cannot copy a state of {other.batch_size} rows into one of {self.batch_size}"
            )
        for name, target in self.layers.tensors().items():
            target.copy_(getattr(other.layers, name))

    def select(self, rows: Sequence[int]) -> DecodeState:
        """A new state with copies of these rows, in this order."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.length.device)
        picked = {
            name: tensor.index_select(0 if name == "length" else 1, index)
            for name, tensor in self.layers.tensors().items()
        }
        return replace(self, layers=GroupState(**picked))

    def check(self, fingerprint: str) -> None:
        if fingerprint != self.fingerprint:
            raise StateError(
                f"this decode state belongs to model {self.fingerprint}, not to {fingerprint}; "
                "make a new one with linearized.new_state(model, batch_size=…) and extend it with "
                "the sequence's tokens"
            )

    def to_bytes(self) -> bytes:
        """As safetensors; read back by `from_bytes`, on any machine."""
        tensors = {name: t.contiguous() for name, t in self.layers.tensors().items()}
        metadata = {"format": FORMAT, "fingerprint": self.fingerprint}
        return safetensors.torch.save(tensors, metadata=metadata)

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
        names = {field.name for field in fields(GroupState)}
        try:
            tensors = safetensors.torch.load(blob)
        except (safetensors.SafetensorError, ValueError) as error:
            raise StateError(f"damaged decode state: {error}") from error
        if set(tensors) != names or "fingerprint" not in metadata:
            raise StateError(f"damaged decode state: it holds {', '.join(sorted(tensors))}")
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        return cls(layers=GroupState(**moved), fingerprint=metadata["fingerprint"])


@dataclass(frozen=True, slots=True)
class Pending:
    """What verified tree nodes would add to the state of length `length`: nothing yet."""

    keys: Tensor
    """[L, B, H, N, D]."""
    values: Tensor
    """[L, B, H, N, E]."""
    parents: list[list[int]]
    """[B][N], -1: child of the last committed token."""
    length: Tensor
    """[B], the state's when the nodes were verified."""

    def check(self, path: Sequence[Sequence[int]], state: DecodeState) -> None:
        """Raises StateError unless `path` walks down each row's tree from the last committed
        token and the state is still the one that was verified against."""
        if len(path) != state.batch_size:
            raise StateError(f"one path a row: {state.batch_size} rows, got {len(path)} paths")
        if not torch.equal(self.length, state.length):
            raise StateError(
                f"these nodes were verified at lengths {self.length.tolist()}, the state is now at "
                f"{state.length.tolist()}: verify again before committing"
            )
        for row, (nodes, parents) in enumerate(zip(path, self.parents, strict=True)):
            last = -1
            for node in nodes:
                if not 0 <= node < len(parents) or parents[node] != last:
                    raise StateError(
                        f"row {row}: {list(nodes)} is no path from the last committed token down "
                        f"a tree with parents {parents}"
                    )
                last = node


def _metadata(blob: bytes) -> dict[str, str]:
    """The header's metadata: safetensors reads it from files only, so the (documented) layout,
    an 8-byte length and then JSON, is read here."""
    import json

    try:
        size = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + size])
        return dict(header.get("__metadata__", {}))
    except (ValueError, AttributeError, TypeError) as error:
        raise StateError("not a decode state: it does not begin as safetensors do") from error
