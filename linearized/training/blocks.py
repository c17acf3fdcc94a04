"""Token blocks: filled, stored, and drawn by step. Knows ids and Arrow; knows nothing of text.

A block is a row of exactly `block` ids. A causal loss shifts inside the row, so it trains on at
most block - 1 predictions, and rows do not overlap. Each token carries marks: whether a document
begins with it, and whether it is learned.

A shard is one Arrow file of blocks whose schema metadata says what it holds; a split is a folder
of shards, read in the order of their names. Files are mapped into memory, so that a process needs
no more of it for a large corpus than for a small one.
"""

from __future__ import annotations

import functools
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from linearized.errors import ConfigError, DataError
from linearized.training.batch import Batch

__all__ = ["FORMAT", "Batch", "Blocks", "Document", "Filled", "ShardInfo", "fill", "write_shard"]

FORMAT = 2
BEGINS = 1
"""Mark of the first token of a document."""
TRAINED = 2
"""Mark of a token whose prediction is in the loss."""
_KEY = b"linearized.blocks"
_OPEN = 256
"""Shards that a process keeps mapped."""


class Document(NamedTuple):
    """Ids of one document from its beginning to its end, both included."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_] | None = None
    """Which tokens are learned. None: all but the first, which nothing precedes."""


class Filled(NamedTuple):
    tokens: NDArray[np.int32]
    """[N, block]."""
    marks: NDArray[np.uint8]
    """[N, block], BEGINS and TRAINED."""
    dropped: int
    """Number of tokens after the last whole block."""
    documents: int


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What the metadata of a shard says about it."""

    block: int
    blocks: int
    tokens: int
    """Number of tokens in the blocks, ends of documents included."""
    trained: int = 0
    """Number of tokens among them whose prediction is in the loss, were all rows one."""
    dropped: int
    """Number of tokens after the last whole block; they are left out."""
    documents: int
    tokenizer: str
    """Fingerprint of the tokenizer that made the ids."""
    source: str
    split: str
    format: int = FORMAT


def fill(documents: Iterable[Document], *, block: int) -> Filled:
    """Blocks of the documents one after another.

    A document goes on in the next block. What is left after the last whole block is dropped: at
    most block - 1 tokens a call, whatever the number of documents.
    """
    if block < 2:
        raise ConfigError(f"block must be at least 2 (one token predicts the next), got {block}")
    pieces, marks = [np.empty(0, np.int32)], [np.empty(0, np.uint8)]
    count = 0
    for ids, trained in documents:
        count += 1
        if not len(ids):
            continue
        mark = np.full(len(ids), TRAINED, np.uint8)
        if trained is not None:
            mark *= trained
        mark[0] = BEGINS
        pieces.append(np.asarray(ids, np.int32))
        marks.append(mark)
    stream, marked = np.concatenate(pieces), np.concatenate(marks)
    whole = len(stream) // block * block
    return Filled(
        tokens=stream[:whole].reshape(-1, block),
        marks=marked[:whole].reshape(-1, block),
        dropped=len(stream) - whole,
        documents=count,
    )


def write_shard(
    file: Path, filled: Filled, *, tokenizer: str, source: str, split: str
) -> ShardInfo:
    """Write a shard, and return what its metadata says. The file is complete or not there at all,
    also if two workers write the same one."""
    info = ShardInfo(
        block=filled.tokens.shape[1],
        blocks=len(filled.tokens),
        tokens=filled.tokens.size,
        trained=int(np.count_nonzero(filled.marks & TRAINED)),
        dropped=filled.dropped,
        documents=filled.documents,
        tokenizer=tokenizer,
        source=source,
        split=split,
    )
    columns = {"tokens": _rows(filled.tokens), "marks": _rows(filled.marks)}
    table = pa.table(columns, metadata={_KEY: json.dumps(asdict(info))})
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=max(len(table), 1))
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return info


class Blocks:
    """All blocks of one shard or of a folder of shards.

    Opening reads metadata only. Rows are copied out of files that are mapped into memory. Shards of
    the first version of this library, Parquet without marks, are read as well: they are decoded
    when first asked for and stay, and the documents of a row are not kept apart.
    """

    def __init__(self, path: Path | str) -> None:
        files = _shards(Path(path))
        self.shards = [_info(file) for file in files]
        first = self.shards[0]
        for file, info in zip(files, self.shards, strict=True):
            if (info.block, info.tokenizer) != (first.block, first.tokenizer):
                raise DataError(
                    f"{file} holds blocks of {info.block} tokens by tokenizer {info.tokenizer}, "
                    f"{files[0]} of {first.block} by {first.tokenizer}; run jobs.data again"
                )
        self.block = first.block
        self.tokenizer = first.tokenizer
        self.tokens = sum(info.tokens for info in self.shards)
        self._starts = np.cumsum([0, *(info.blocks for info in self.shards)])
        if len(self) == 0:
            raise DataError(f"{path} holds no whole block of {self.block} tokens; bring more text")
        self._shard = functools.lru_cache(maxsize=_OPEN)(
            lambda shard: _open(files[shard], self.shards[shard])
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
        """The blocks at these indices, in this order, as int64 [len(indices), block]."""
        return torch.from_numpy(self._read(indices)[0])

    def batch_of(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The blocks at these indices, in this order, with their documents."""
        tokens, marks = self._read(indices)
        begins = (marks & BEGINS).astype(bool)
        begins[:, 0] = False
        trained = (marks & TRAINED).astype(bool)
        trained[:, 0] = False
        return Batch(
            tokens=torch.from_numpy(tokens),
            segment_ids=torch.from_numpy(begins.cumsum(1)) if begins.any() else None,
            trained=None if trained[:, 1:].all() else torch.from_numpy(trained),
        )

    def batch(
        self, step: int, *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> Batch:
        """This rank's share, batch_size / world_size rows, of the batch of a step.

        A pure function of its arguments. The ranks' shares, one after another, are the same
        `batch_size` blocks for every world size, so a run goes on exactly at any step with any
        number of workers. Each epoch goes through all blocks once, in an order of its own; a
        batch may reach into the next epoch.
        """
        if batch_size < 1 or world_size < 1 or batch_size % world_size:
            raise ConfigError(
                f"batch_size must be a multiple of world_size {world_size}, got {batch_size}"
            )
        if step < 0 or not 0 <= rank < world_size:
            raise ConfigError(f"there is no step {step}, rank {rank} of {world_size}")
        share = batch_size // world_size
        first = step * batch_size + rank * share
        size = len(self)
        return self.batch_of([_place(at, size, seed) for at in range(first, first + share)])

    def _read(
        self, indices: Sequence[int] | NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        wanted = np.asarray(indices, np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"blocks are 0 to {len(self) - 1}, got {wanted.tolist()}")
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        tokens = np.empty((len(wanted), self.block), np.int64)
        marks = np.empty((len(wanted), self.block), np.uint8)
        for shard in np.unique(shards):
            here = shards == shard
            at = wanted[here] - self._starts[shard]
            all_tokens, all_marks = self._shard(int(shard))
            tokens[here] = all_tokens[at]
            marks[here] = TRAINED if all_marks is None else all_marks[at]
        return tokens, marks


def _place(at: int, size: int, seed: int) -> int:
    """The block that comes in this place of the endless sequence of epochs.

    A Feistel network of four rounds permutes the smallest square of a power of two that holds all
    blocks; what it puts beyond the last block goes through it again (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002). No list of blocks is kept, whatever their number, and the
    order is the same in every release of numpy and torch, which neither promises of its own
    shuffles: a run may be taken up by another machine.
    """
    key = _mix(_mix(seed % 2**64) + at // size)
    half = ((size - 1).bit_length() + 1) // 2
    low = (1 << half) - 1
    place = at % size
    while True:
        left, right = place >> half, place & low
        for turn in range(4):
            left, right = right, left ^ (_mix(key + (turn << 56) + right) & low)
        place = left << half | right
        if place < size:
            return place


def _mix(x: int) -> int:
    """splitmix64 (Steele, Lea, Flood 2014): a bijection of 64 bits that scatters neighbours."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def _rows(values: NDArray[Any]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _shards(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"there are no blocks at {path}; run jobs.data first")
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.arrow")) or sorted(path.glob("*.parquet"))
    if not files:
        raise DataError(f"there are no shards (*.arrow) in {path}; run jobs.data first")
    return files


def _info(file: Path) -> ShardInfo:
    try:
        if file.suffix == ".parquet":
            metadata = pq.read_schema(file).metadata or {}
        else:
            with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as reader:
                metadata = reader.schema.metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file} is no file of token blocks, or not whole: {error}; run jobs.data again"
        ) from error
    if _KEY not in metadata:
        raise DataError(f"{file} holds no token blocks; jobs.data turns text into blocks")
    fields = json.loads(metadata[_KEY])
    wanted = 1 if file.suffix == ".parquet" else FORMAT
    if fields.get("format") != wanted:
        raise DataError(
            f"{file} has format {fields.get('format')}, this version reads {wanted}; run jobs.data "
            "again"
        )
    return ShardInfo(**fields)


def _open(file: Path, info: ShardInfo) -> tuple[NDArray[np.int32], NDArray[np.uint8] | None]:
    """Tokens and marks [blocks, block]: views of the file."""
    if file.suffix == ".parquet":
        table = pq.read_table(file, columns=["tokens"]).combine_chunks()
    else:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()

    def view(name: str) -> NDArray[Any]:
        if not len(table):
            return np.empty((0, info.block), np.int32)
        [chunk] = table[name].chunks
        return chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, info.block)

    return view("tokens"), view("marks") if "marks" in table.column_names else None
