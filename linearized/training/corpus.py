"""Documents: from the name of a source to texts, piece by piece. Knows files and the datasets
library; knows nothing of tokens.

A source is "stdlib" (the running Python's own modules: real text that every machine has), a file,
a folder or a glob of text, JSON Lines or Parquet, or the name of a Hugging Face dataset. It is cut
into pieces that can be read apart from each other, on any machine that sees the files.

A document of text is called by its file, a row by its number in the source. A row may also hold a
conversation, which travels as JSON.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from linearized.errors import DataError
from linearized.training import files, pieces
from linearized.training.files import STDLIB, File, shown
from linearized.training.pieces import Piece, Problem

__all__ = ["STDLIB", "Skipped", "Source", "documents", "find", "fingerprint", "read"]

_LOOK = 100
"""Rows that are looked at to tell what columns there are."""
_EXAMPLES = 10
"""Problems that are told one by one."""
_MESSAGES = "messages"
_PAIR = ("prompt", "completion")


@dataclass(frozen=True, kw_only=True)
class Source:
    name: str
    pieces: tuple[Piece, ...]
    columns: tuple[str, ...] = ()
    """Of rows that are read."""
    chat: bool = False
    """Does a row hold a conversation, rather than a text?"""

    @property
    def is_text(self) -> bool:
        return not self.columns

    def numbered(self, counts: Sequence[int]) -> Source:
        """With the number of rows of each piece known."""
        firsts = itertools.accumulate(counts, initial=0)
        numbered = zip(self.pieces, firsts, counts, strict=False)
        pieces = tuple(replace(p, first=first, rows=rows) for p, first, rows in numbered)
        return replace(self, pieces=pieces)


@dataclass(kw_only=True)
class Skipped:
    """What was left out of a corpus, and why."""

    empty: int = 0
    """Number of rows and files without text."""
    unreadable: int = 0
    """Number of others."""
    examples: list[str] = field(default_factory=list)
    """The first of these, each with its reason."""

    def add(self, problem: str) -> None:
        self.unreadable += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(problem)

    def join(self, other: Skipped) -> None:
        self.empty += other.empty
        self.unreadable += other.unreadable
        self.examples += other.examples[: _EXAMPLES - len(self.examples)]


def find(
    source: str, *, text_column: str | None = None, split: str = "train", scratch: Path
) -> Source:
    """The pieces of a source. A Hugging Face dataset is written to the folder `scratch` as Parquet
    first; `name:config` chooses one of its configurations, and `split` its split. `text_column` may
    be left out where there is a column `text`, only one of strings, a column `messages`, or
    `prompt` and `completion`.

    Raises:
        DataError: it is missing, empty, of several kinds, or out of reach.
    """
    found = files.find(source)
    if found is None:
        found = [_download(source, split, scratch)]
    kind = files.kind(source, found)
    cut = pieces.cut(found, kind, source)
    if kind == "text":
        return Source(name=source, pieces=cut)
    columns, chat = _columns(_look(cut, source), text_column, source)
    made = Source(name=source, pieces=cut, columns=columns, chat=chat)
    return made.numbered([p.rows or 0 for p in cut]) if kind == "parquet" else made


def documents(
    piece: Piece,
    source: Source,
    skipped: Skipped,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, str]]:
    """(name, text) of each document that is wanted of a piece whose rows are numbered. What has no
    text or cannot be read is told to `skipped`."""
    for name, text in _named(piece, source, wanted):
        if isinstance(text, Problem):
            skipped.add(f"{shown(piece.path)}{'' if source.is_text else f', row {name}'}: {text}")
        elif not text:
            skipped.empty += 1
        else:
            yield name, text


def read(source: str, *, text_column: str | None = None, split: str = "train") -> pa.Table:
    """A table of `document` and `text`, of a source that fits into memory.

    Raises:
        DataError: as `find`; or it holds no text, or conversations.
    """
    skipped = Skipped()
    with tempfile.TemporaryDirectory(prefix="lin-") as scratch:
        found = find(source, text_column=text_column, split=split, scratch=Path(scratch))
        if found.chat:
            raise DataError(f"source {source!r} holds conversations; set text_column to read text")
        if not found.is_text:
            found = found.numbered([pieces.count(piece) for piece in found.pieces])
        each = (documents(piece, found, skipped) for piece in found.pieces)
        rows = list(itertools.chain.from_iterable(each))
    if not rows:
        raise no_text(source, skipped)
    names, texts = zip(*rows, strict=True)
    return pa.table({"document": names, "text": pa.array(texts, pa.large_string())})


def no_text(source: str, skipped: Skipped) -> DataError:
    """What to raise if nothing is left of a source."""
    why = f" ({skipped.examples[0]})" if skipped.examples else ""
    return DataError(f"source {source!r} holds no text{why}; name another file, folder or dataset")


def fingerprint(source: str, split: str = "train") -> str:
    """A hash that changes when a local file of the source changes. For a Hugging Face dataset it
    depends on the name only."""
    digest = hashlib.blake2b(f"{source} {split}".encode(), digest_size=16)
    for file in files.find(source) or ():
        digest.update(f"{file.name} {file.size} {file.changed}\n".encode())
    return digest.hexdigest()


def held_out(document: str, fraction: float) -> bool:
    """Whether a document is kept from training. The answer depends on the document's name only, so
    it is the same on every machine and in every corpus."""
    return _position(document) < fraction


def split_documents(names: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out, each in order and neither empty: where chance held
    out none or all of a few documents, the one with the lowest or highest position changes sides.
    """
    odd = odd_one_out(names, fraction)
    held = [held_out(name, fraction) != (i == odd) for i, name in enumerate(names)]
    sides: tuple[list[int], list[int]] = ([], [])
    for i, one in enumerate(held):
        sides[one].append(i)
    return sides


def odd_one_out(names: Sequence[str], fraction: float) -> int | None:
    """The index of the document that has to change sides, so that neither is empty."""
    if len(names) < 2:
        raise DataError(
            "one document cannot be split in two; bring at least two files or rows, so that one "
            "can be held out"
        )
    held = sum(held_out(name, fraction) for name in names)
    if 0 < held < len(names):
        return None
    at = sorted(range(len(names)), key=lambda i: (_position(names[i]), i))
    return at[-1] if held else at[0]


def _position(document: str) -> float:
    """Uniform in [0, 1). Python's own hash() differs from process to process."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _named(
    piece: Piece, source: Source, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, str]]:
    if source.is_text:
        if wanted(piece.name):
            yield piece.name, pieces.text(piece)
        return
    for number, row in pieces.rows(piece, source.columns, lambda number: wanted(str(number))):
        yield str(number), row if isinstance(row, Problem) else _value(row, source)


def _value(row: Any, source: Source) -> str:
    """The text of a row; "" if it has none."""
    if not isinstance(row, dict):
        return Problem(f"is no object, but {type(row).__name__}")
    values = [row.get(name) for name in source.columns]
    if any(value is None for value in values):
        return ""
    if source.chat:
        text = json.dumps(dict(zip(source.columns, values, strict=True)))
    elif isinstance(values[0], str):
        text = values[0]
    else:
        return Problem(f"{source.columns[0]} is no text, but {type(values[0]).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Problem(f"{source.columns[0]} is no valid Unicode ({error.reason})")
    return text


def _look(found: Sequence[Piece], source: str) -> dict[str, str]:
    """The columns of the first rows, and what they hold: `text`, `messages` or `other`."""
    if found and found[0].kind == "parquet":
        return {column.name: _holds(column.type) for column in pieces.schema(found[0])}
    columns: dict[str, set[str]] = {}
    problem = ""
    first = itertools.chain.from_iterable(map(pieces.first_rows, found))
    for row in itertools.islice(first, _LOOK):
        if isinstance(row, dict):
            for name, value in row.items():
                if value is not None:
                    columns.setdefault(name, set()).add(_type(value))
        elif not problem:
            problem = f": a row {row if isinstance(row, Problem) else 'is no object'}"
    if not columns:
        raise DataError(f"source {source!r} is empty, or cannot be read as json{problem}")
    return {name: _first_of(kinds) for name, kinds in columns.items()}


def _first_of(kinds: set[str]) -> str:
    """What a column is read as. Rows that hold something else are left out."""
    return next(kind for kind in ("text", "messages", "other") if kind in kinds)


def _holds(column: pa.DataType) -> str:
    if pa.types.is_dictionary(column):
        column = column.value_type
    if pa.types.is_string(column) or pa.types.is_large_string(column):
        return "text"
    is_list = pa.types.is_list(column) or pa.types.is_large_list(column)
    if is_list and pa.types.is_struct(column.value_type):
        names = [field.name for field in column.value_type]
        return "messages" if "role" in names else "other"
    return "other"


def _type(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        return "messages"
    return "other"


def _columns(
    found: dict[str, str], wanted: str | None, source: str
) -> tuple[tuple[str, ...], bool]:
    """The columns to read, and whether they hold conversations."""
    strings = [name for name, kind in found.items() if kind == "text"]
    chats = [name for name, kind in found.items() if kind == "messages"]
    choices = f"its columns of text are: {', '.join(strings) or 'none'}"
    if wanted is not None:
        if wanted not in (*strings, *chats):
            raise DataError(f"source {source!r} has no text column {wanted!r}; {choices}")
        return (wanted,), wanted in chats
    if "text" in strings:
        return ("text",), False
    if _MESSAGES in chats:
        return (_MESSAGES,), True
    if all(name in (*strings, *chats) for name in _PAIR):
        return _PAIR, True
    if len(strings) != 1:
        raise DataError(f"which column of {source!r} is the text? Set text_column; {choices}")
    return (strings[0],), False


def _download(source: str, split: str, scratch: Path) -> File:
    """A Hugging Face dataset as a file of Parquet."""
    import datasets

    name, _, config = source.partition(":")
    try:
        with _no_progress_bars(datasets):
            rows = datasets.load_dataset(name, config or None, split=split)
            readable = [name for name, kind in rows.features.items() if _is_readable(name, kind)]
            scratch.mkdir(parents=True, exist_ok=True)
            rows.select_columns(readable).to_parquet(scratch / "rows.parquet")
    except ConnectionError as error:
        raise DataError(
            f"there is no file or folder {source!r}, and the Hugging Face Hub cannot be reached to "
            f"look for a dataset of that name ({error}); check the name or the network"
        ) from error
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise DataError(
            f"there is no file, folder or Hugging Face dataset {source!r}; check the name, or log "
            f"in with `hf auth login` if it is private ({error})"
        ) from error
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise DataError(f"Hugging Face dataset {source!r}, split {split!r}: {error}") from error
    path = scratch / "rows.parquet"
    return File(path.name, str(path), path.stat().st_size, 0)


def _is_readable(name: str, feature: Any) -> bool:
    """Pictures and the like stay where they are."""
    text = getattr(feature, "dtype", None) in ("string", "large_string")
    return text or name in (_MESSAGES, *_PAIR)


@contextmanager
def _no_progress_bars(datasets: Any) -> Iterator[None]:
    """The job shows one of its own."""
    were_shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            datasets.enable_progress_bars()
