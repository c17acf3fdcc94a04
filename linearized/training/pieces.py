"""Pieces of a source: what is read at a time, on any machine that sees the files. Knows bytes,
lines and row groups; knows nothing of what columns mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from linearized.errors import DataError
from linearized.training import files
from linearized.training.files import File, shown

RANGE = 2**24
"""A file of JSON Lines is read in ranges of so many bytes."""
_START = b"\xef\xbb\xbf"
"""A byte order mark."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A file, or a range of its bytes or row groups."""

    path: str
    kind: str
    """`text`, `json` or `parquet`."""
    size: int
    """Bytes of what is in it, about."""
    name: str = ""
    """Of the document, if the piece is one text."""
    start: int = 0
    stop: int | None = None
    """Of bytes or row groups. None: all."""
    first: int | None = None
    """Number of the first row in the source. None: not counted yet."""
    rows: int | None = None
    """Number of rows, if that is known without reading them."""


class Problem(str):
    """Why a document, or a whole piece, cannot be read."""


def cut(found: Iterable[File], kind: str, source: str) -> tuple[Piece, ...]:
    """
    Raises:
        DataError: a file is no Parquet.
    """
    ways = {"text": _whole, "json": _ranges, "parquet": _row_groups}
    return tuple(piece for file in found for piece in ways[kind](file, source))


def count(piece: Piece) -> int:
    """Number of rows, also of those that cannot be read."""
    return sum(1 for _ in _lines(piece)) if piece.rows is None else piece.rows


def text(piece: Piece) -> str:
    """Of a piece that is one text."""
    try:
        with files.opened(piece.path) as stream:
            content = stream.read()
    except files.UNREADABLE as error:
        return Problem(f"cannot be read ({error})")
    if (zero := content.find(0)) >= 0:
        return Problem(f"is no text: byte {zero} is zero")
    return _decoded(content.removeprefix(_START))


def rows(
    piece: Piece, columns: Sequence[str], wanted: Callable[[int], bool]
) -> Iterator[tuple[int, Any]]:
    """The number in the source, and the row, of each that is wanted: usually a dict, or a Problem.
    Of Parquet only these columns are read: what others hold is nobody's concern."""
    assert piece.first is not None, "rows are not numbered"
    if piece.kind == "parquet":
        numbered = enumerate(_parquet(piece, columns), piece.first)
        return ((number, row) for number, row in numbered if wanted(number))
    lines = enumerate(_lines(piece), piece.first)
    return ((number, _row(line)) for number, line in lines if wanted(number))


def first_rows(piece: Piece) -> Iterator[Any]:
    """Rows of JSON, to look at what there is."""
    return map(_row, _lines(piece))


def schema(piece: Piece) -> pa.Schema:
    """Of a piece of Parquet."""
    with open(piece.path, "rb") as stream:
        return pq.ParquetFile(stream).schema_arrow


def _whole(file: File, _: str) -> Iterator[Piece]:
    yield Piece(path=file.path, kind="text", size=file.size, name=file.name)


def _ranges(file: File, _: str) -> Iterator[Piece]:
    """Of bytes, unless the file can only be read as a whole."""
    whole = Piece(path=file.path, kind="json", size=file.size)
    if files.is_compressed(file.path):
        yield replace(whole, size=4 * file.size)
        return
    try:
        is_array = _is_array(file.path)
    except OSError as error:
        raise DataError(f"cannot read {shown(file.path)}: {error.strerror}") from error
    if is_array:
        yield whole
    else:
        for start in range(0, file.size, RANGE):
            stop = min(start + RANGE, file.size)
            yield replace(whole, size=stop - start, start=start, stop=stop)


def _row_groups(file: File, source: str) -> Iterator[Piece]:
    try:
        with open(file.path, "rb") as stream:
            metadata = pq.ParquetFile(stream).metadata
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"source {source!r} cannot be read as parquet: {shown(file.path)}: {error}"
        ) from error
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        yield Piece(
            path=file.path,
            kind="parquet",
            size=group.total_byte_size,
            start=number,
            stop=number + 1,
            rows=group.num_rows,
        )


def _row(line: Any) -> Any:
    """Of a line, unless it is one already."""
    if not isinstance(line, bytes):
        return line
    content = _decoded(line)
    return content if isinstance(content, Problem) else _loaded(content)


def _lines(piece: Piece) -> Iterator[Any]:
    """The lines that begin in the piece, as bytes, blank ones left out; or the rows of a file that
    is one JSON array."""
    try:
        if piece.start == 0 and _is_array(piece.path):
            yield from _array(piece.path)
            return
        with files.opened(piece.path) as stream:
            at = _first_line(stream, piece)
            while piece.stop is None or at < piece.stop:
                line = stream.readline()
                if not line:
                    return
                content = line.removeprefix(_START) if at == 0 else line
                at += len(line)
                if content.strip():
                    yield content
    except files.UNREADABLE as error:
        yield Problem(f"cannot be read ({error})")


def _first_line(stream: IO[bytes], piece: Piece) -> int:
    """Go to where the first line of the piece begins: a line that reaches into it belongs to the
    one before it."""
    if piece.start == 0:
        return 0
    at = piece.start - 1
    stream.seek(at)
    while piece.stop is None or at < piece.stop:
        found = stream.readline(2**20)
        at += len(found)
        if not found or found.endswith(b"\n"):
            break
    return at


def _is_array(path: str) -> bool:
    with files.opened(path) as stream:
        return stream.read(1024).removeprefix(_START).lstrip().startswith(b"[")


def _array(path: str) -> Iterator[Any]:
    with files.opened(path) as stream:
        content = _decoded(stream.read().removeprefix(_START))
    found = content if isinstance(content, Problem) else _loaded(content)
    yield from found if isinstance(found, list) else [found]


def _loaded(content: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        return Problem(f"is no JSON ({error})")


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        return Problem(f"is not UTF-8 ({error.reason} at byte {error.start})")


def _parquet(piece: Piece, columns: Sequence[str]) -> Iterator[Any]:
    assert piece.stop is not None
    try:
        with open(piece.path, "rb") as stream:
            file = pq.ParquetFile(stream)
            there = [name for name in columns if name in file.schema_arrow.names]
            groups = list(range(piece.start, piece.stop))
            for batch in file.iter_batches(256, row_groups=groups, columns=there):
                yield from _plain(batch)
    except (OSError, pa.ArrowException) as error:
        yield Problem(f"cannot be read ({error})")


def _plain(batch: pa.RecordBatch) -> Iterator[Any]:
    """A value that is no UTF-8 costs its own row only."""
    try:
        found: list[Any] = batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            yield Problem(f"is not UTF-8 ({error.reason} at byte {error.start})")
            return
        for row in range(len(batch)):
            yield from _plain(batch.slice(row, 1))
        return
    yield from found
