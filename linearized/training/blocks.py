"""Token blocks: filled, stored, and drawn by step. Knows ids and Parquet; knows nothing of text.

A block is a row of exactly `block` ids. A causal loss shifts inside the row, so it trains on
block - 1 predictions, and rows do not overlap.

A shard is one Parquet file of blocks whose schema metadata says what it holds; a split is a folder
of shards, read in the order of their names.
"""

from __future__ import annotations

import functools
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from linearized.errors import ConfigError, DataError

FORMAT = 1
_KEY = b"linearized.blocks"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What the metadata of a shard says about it."""

    block: int
    blocks: int
    tokens: int
    """Number of tokens in the blocks, ends of documents included."""
    dropped: int
    """Number of tokens after the last whole block; they are left out."""
    documents: int
    tokenizer: str
    """Fingerprint of the tokenizer that made the ids."""
    source: str
    split: str
    format: int = FORMAT


def fill(
    documents: Iterable[Sequence[int]], *, block: int, end: int
) -> tuple[NDArray[np.int32], int]:
    """Blocks [N, block] of the documents one after another, each followed by `end`, and how many
    tokens were dropped.

    A document goes on in the next block. What is left after the last whole block is dropped: at
    most block - 1 tokens a call, whatever the number of documents.
    """
    if block < 2:
        raise ConfigError(f"block must be at least 2 (one token predicts the next), got {block}")
    pieces = [np.append(np.asarray(ids, np.int32), np.int32(end)) for ids in documents]
    stream = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    whole = len(stream) // block * block
    return stream[:whole].reshape(-1, block), len(stream) - whole


def write_shard(file: Path, rows: NDArray[np.int32], info: ShardInfo) -> None:
    """Write a shard. The file is complete or not there at all, also if two workers write the same
    one."""
    assert rows.shape == (info.blocks, info.block) and rows.size == info.tokens
    flat = pa.array(np.ascontiguousarray(rows).reshape(-1), pa.int32())
    column = pa.FixedSizeListArray.from_arrays(flat, info.block)
    table = pa.table({"tokens": column}, metadata={_KEY: json.dumps(asdict(info))})
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        pq.write_table(table, part, compression="zstd")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


class Blocks:
    """All blocks of one shard or of a folder of shards.

    Opening reads metadata only. A shard's rows are decoded when first asked for and stay, four
    bytes a token.
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
        self._files = files
        self._starts = np.cumsum([0, *(info.blocks for info in self.shards)])
        self._rows: dict[int, NDArray[np.int32]] = {}
        if len(self) == 0:
            raise DataError(f"{path} holds no whole block of {self.block} tokens; bring more text")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
        """The blocks at these indices, in this order, as int64 [len(indices), block]."""
        wanted = np.asarray(indices, np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"blocks are 0 to {len(self) - 1}, got {wanted.tolist()}")
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        out = np.empty((len(wanted), self.block), np.int64)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._shard(int(shard))[wanted[here] - self._starts[shard]]
        return torch.from_numpy(out)

    def batch(
        self, step: int, *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> torch.Tensor:
        """This rank's share, int64 [batch_size / world_size, block], of the batch of a step.

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
        positions = range(first, first + share)
        size = len(self)
        return self.rows([int(_order(size, seed, at // size)[at % size]) for at in positions])

    def _shard(self, shard: int) -> NDArray[np.int32]:
        if shard not in self._rows:
            table = pq.read_table(self._files[shard], memory_map=True)
            flat = table["tokens"].combine_chunks().flatten().to_numpy()
            self._rows[shard] = flat.reshape(-1, self.block)
        return self._rows[shard]


@functools.lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation. Sorted hashes are the same in every release of numpy and torch, which neither
    promises of its own shuffles, and a run may be taken up by another machine."""
    key = _mix(_mix(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch))
    return np.argsort(_mix(np.arange(size, dtype=np.uint64) + key), kind="stable")


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea, Flood 2014): a bijection of 64 bits that scatters neighbours."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shards(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"there are no blocks at {path}; run jobs.data first")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"there are no .parquet files in {path}; run jobs.data first")
    return files


def _info(file: Path) -> ShardInfo:
    try:
        metadata = pq.read_schema(file).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} is not a Parquet file that can be read: {error}") from error
    if _KEY not in metadata:
        raise DataError(f"{file} holds no token blocks; jobs.data turns text into blocks")
    fields = json.loads(metadata[_KEY])
    if fields.get("format") != FORMAT:
        raise DataError(
            f"{file} has format {fields.get('format')}, this version reads {FORMAT}; run jobs.data "
            "again"
        )
    return ShardInfo(**fields)
