"""Shards of jobs.data: which pieces of a corpus go into which, and how one is written. Knows texts
and token blocks; knows nothing of Ray.

What a shard holds depends on the corpus only, and it carries its own name, so the files are the
same for any number of workers and any order in which they finish.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from linearized.errors import LinearizedError
from linearized.training import chat, corpus, tokenizer
from linearized.training.blocks import Document, fill, write_shard
from linearized.training.corpus import Skipped, Source
from linearized.training.pieces import Piece

TRAIN, HELD_OUT = "train", "held_out"
SMALLEST, LARGEST = 2**20, 2**26
"""Bytes of text in a shard, about."""
FEW = 100_000
"""So many rows may all happen to fall on one side of the split."""
TOGETHER = 2**20
"""Characters that are encoded at a time."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    path: str
    split: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Shard:
        return cls(**{**fields, "pieces": tuple(Piece(**piece) for piece in fields["pieces"])})


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Which documents are held out."""

    fraction: float
    odd: str | None = None
    """A document that is on the other side than its name says, so that neither side is empty."""

    @classmethod
    def of(cls, source: Source, fraction: float) -> Sides:
        if source.is_text:
            names = [piece.name for piece in source.pieces]
        else:
            last = source.pieces[-1]
            num_rows = (last.first or 0) + (last.rows or 0)
            if num_rows > FEW:
                return cls(fraction=fraction)
            names = [str(row) for row in range(num_rows)]
        odd = corpus.odd_one_out(names, fraction)
        return cls(fraction=fraction, odd=None if odd is None else names[odd])

    def of_document(self, name: str) -> str:
        held = corpus.held_out(name, self.fraction) != (name == self.odd)
        return HELD_OUT if held else TRAIN


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Turns the documents of a shard into blocks. Every worker gets this one."""

    source: Source
    """Without its pieces."""
    sides: Sides
    folder: str
    """Of the tokenizer."""
    edges: tokenizer.Edges
    tokenizer: str
    """Fingerprint of the tokenizer."""
    block: int

    def write(self, shard: Shard) -> dict[str, Any]:
        """What the shard's metadata says, and `skipped`; or an `error`, in one sentence."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker has one core
        skipped = Skipped()
        try:
            filled = fill(self._documents(shard, skipped), block=self.block)
            info = write_shard(
                Path(shard.path),
                filled,
                tokenizer=self.tokenizer,
                source=self.source.name,
                split=shard.split,
            )
        except (LinearizedError, OSError) as error:
            return {"error": str(error)}
        return {**asdict(info), "skipped": asdict(skipped)}

    def _documents(self, shard: Shard, skipped: Skipped) -> Iterator[Document]:
        named = texts(shard, self.source, self.sides, skipped)
        if self.source.chat:
            encode = _chat_encoder(self.folder, self.edges, self.tokenizer)
            for name, conversation in named:
                try:
                    yield encode(conversation)
                except chat.Refused as error:
                    skipped.add(f"row {name} {error}")
            return
        before, after = self.edges
        encoder = _encoder(self.folder, self.tokenizer)
        for together in _together(text for _, text in named):
            for ids in encoder(together):
                yield Document(np.array([*before, *ids, *after], np.int32))


def plan(source: Source, sides: Sides, folder: Path) -> list[Shard]:
    """The shards of both splits, of about the same size: consecutive documents of 1 to 64 MiB of
    text together, at most about 1,000 shards if that can be. Rows of both sides lie in the same
    pieces, so a shard of the smaller side takes more of them, and leaves out the others."""
    shards = []
    limit = min(max(sum(piece.size for piece in source.pieces) // 1000, SMALLEST), LARGEST)
    for split in (TRAIN, HELD_OUT):
        pieces = source.pieces
        most: float = limit
        if source.is_text:
            pieces = tuple(p for p in pieces if sides.of_document(p.name) == split)
        else:
            most /= sides.fraction if split == HELD_OUT else 1 - sides.fraction
        for number, together in enumerate(_grouped(pieces, most)):
            path = str(folder / split / f"{number:05d}.arrow")
            shards.append(Shard(path=path, split=split, pieces=together))
    return shards


def texts(
    shard: Shard, source: Source, sides: Sides, skipped: Skipped
) -> Iterator[tuple[str, str]]:
    """(name, text) of the documents of a shard."""

    def wanted(name: str) -> bool:
        return sides.of_document(name) == shard.split

    for piece in shard.pieces:
        yield from corpus.documents(piece, source, skipped, wanted)


def speed(encoder: tokenizer.Encoder, documents: Iterable[str], seconds: float = 0.5) -> float:
    """Tokens a second that the tokenizer makes of these texts, on all cores of this machine."""
    tokens, passed = 0, 0.0
    for together in _together(documents):
        began = time.perf_counter()
        tokens += sum(map(len, encoder(together)))
        passed += time.perf_counter() - began
        if passed >= seconds:
            break
    return tokens / passed if passed else 0.0


@functools.lru_cache(maxsize=1)
def _encoder(folder: str, fingerprint: str) -> tokenizer.Encoder:
    """A worker opens the tokenizer once, for all of its shards: that takes as long as some hundred
    thousand tokens."""
    return tokenizer.Encoder(folder)


@functools.lru_cache(maxsize=1)
def _chat_encoder(folder: str, edges: tokenizer.Edges, fingerprint: str) -> chat.ChatEncoder:
    return chat.ChatEncoder(folder, edges)


def _together(documents: Iterable[str]) -> Iterator[list[str]]:
    found: list[str] = []
    size = 0
    for text in documents:
        found.append(text)
        size += len(text)
        if size >= TOGETHER:
            yield found
            found, size = [], 0
    if found:
        yield found


def _grouped(pieces: Iterable[Piece], most: float) -> Iterator[tuple[Piece, ...]]:
    """Consecutive ones that have no more than this size together, or are one."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.size > most:
            yield tuple(group)
            group, size = [], 0
        group.append(piece)
        size += piece.size
    if group:
        yield tuple(group)
