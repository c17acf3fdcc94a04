"""Decode states as bytes: safetensors, never pickle. Knows names, types and shapes of tensors;
knows nothing of what they mean.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from linearized.errors import StateError
from linearized.near import Near
from linearized.state.group import GroupState

FORMAT = "linearized-state/3"
OPTIONAL = {"history.keys", "history.values", "cross", "shift"}


def write(tensors: dict[str, Tensor], fingerprint: str, near: Near, note: str = "") -> bytes:
    """Equal tensors give equal bytes."""
    metadata = {"format": FORMAT, "fingerprint": fingerprint, "near": json.dumps(asdict(near))}
    if note:
        metadata["note"] = note
    return _in_order(safetensors.torch.save(tensors, metadata=metadata))


def read(blob: bytes) -> tuple[dict[str, Tensor], str, Near]:
    """What `write` was given.

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
    names = {field.name for field in fields(GroupState)} - {"near"}
    known = names <= set(tensors) <= names | OPTIONAL
    halved = ("history.keys" in tensors) != ("history.values" in tensors)
    if not known or halved or "fingerprint" not in metadata:
        raise StateError(f"damaged decode state: it holds {', '.join(sorted(tensors))}")
    near = _near(metadata.get("near", ""))
    _check_shapes(tensors, near)
    return tensors, metadata["fingerprint"], near


def note(blob: bytes) -> str:
    """What `write` was given.

    Raises:
        StateError: the bytes are something else.
    """
    return str(_metadata(blob).get("note", ""))


def _near(text: str) -> Near:
    """From the header."""
    names = [field.name for field in fields(Near)]
    try:
        found = json.loads(text)
        sizes = [found[name] for name in names]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StateError(f"damaged decode state: near is {text[:80]!r}") from error
    whole = all(type(size) is int and 0 <= size < 1 << 31 for size in sizes)
    if len(found) != len(names) or not whole or not sizes[0]:
        raise StateError(f"damaged decode state: near is {text[:80]!r}")
    return Near(*sizes)


def _check_shapes(tensors: dict[str, Tensor], near: Near) -> None:
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
    fits(keys[3] == near.slots, "keys")
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
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise StateError("not a decode state: it does not begin as safetensors do") from error
