"""Documents: from a name to a table of texts. Knows files and the datasets library; knows nothing
of tokens.

A source is "stdlib" (the running Python's own modules: real text that every machine has), a file,
a folder or a glob of text, JSON Lines or Parquet, or the name of a Hugging Face dataset.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from linearized.errors import DataError

STDLIB = "stdlib"

# site-packages are not the library's; tests hold broken encodings and tables on purpose.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_COMPRESSED = {".gz", ".bz2", ".zst", ".xz", ".lz4"}
_KINDS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
"""The builder of the datasets library for each suffix. Every other file is read as one text."""


def read(source: str, *, text_column: str | None = None, split: str = "train") -> pa.Table:
    """A table of `document`, a name that stays the same from machine to machine, and `text`.

    A text file is one document, named by its path below the folder. A row of JSON Lines, Parquet
    or a dataset is one document, named by its number. Documents without text are left out.
    `name:config` chooses a configuration of a Hugging Face dataset, and `split` its split.
    `text_column` may be left out where there is a column `text` or only one of strings.

    DataError for what is missing, empty, not UTF-8 or out of reach.
    """
    files = _files(source)
    if files is None:
        table = _rows(_download(source, split), text_column, source)
    else:
        kind = _kind(source, files)
        if kind == "text":
            table = _texts(files)
        else:
            table = _rows(_load(source, kind, files), text_column, source)
    table = table.filter(pc.greater(pc.fill_null(pc.binary_length(table["text"]), 0), 0))
    if table.num_rows == 0:
        raise DataError(f"source {source!r} holds no text; name another file, folder or dataset")
    return table


def fingerprint(source: str, split: str = "train") -> str:
    """A hash that changes when a local file of the source changes. For a Hugging Face dataset it
    depends on the name only."""
    digest = hashlib.blake2b(f"{source} {split}".encode(), digest_size=16)
    for document, path in (_files(source) or {}).items():
        stat = path.stat()
        digest.update(f"{document} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def held_out(document: str, fraction: float) -> bool:
    """Whether a document is kept from training. The answer depends on the document's name only, so
    it is the same on every machine and in every corpus."""
    return _position(document) < fraction


def split_documents(documents: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out, each in order and neither empty: where chance held
    out none or all of a few documents, the one with the lowest or highest position changes sides.
    """
    if len(documents) < 2:
        raise DataError(
            "one document cannot be split in two; bring at least two files or rows, so that one "
            "can be held out"
        )
    held = {i for i, document in enumerate(documents) if held_out(document, fraction)}
    by_position = sorted(range(len(documents)), key=lambda i: (_position(documents[i]), i))
    if not held:
        held = {by_position[0]}
    elif len(held) == len(documents):
        held.remove(by_position[-1])
    return [i for i in range(len(documents)) if i not in held], sorted(held)


def _position(document: str) -> float:
    """Uniform in [0, 1). Python's own hash() differs from process to process."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _files(source: str) -> dict[str, Path] | None:
    """document name → file, sorted by name; None if the source is the name of a dataset."""
    if source == STDLIB:
        return _stdlib()
    path = Path(source).expanduser()
    if path.is_file():
        return {path.name: path}
    if path.is_dir():
        found = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
        files = {name: p for name, p in found.items() if not _hidden(name)}
    elif glob.has_magic(source):
        root = _fixed(path)
        matches = map(Path, glob.glob(str(path), recursive=True))
        files = {p.relative_to(root).as_posix(): p for p in matches if p.is_file()}
    elif _is_path(source):
        raise DataError(f"there is no file or folder {source!r}; check the path, or use a glob")
    else:
        return None
    if not files:
        raise DataError(f"source {source!r} matches no files; check the path")
    return dict(sorted(files.items()))


def _stdlib() -> dict[str, Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        # What a build wrote about its machine is no source: _sysconfigdata_*, config-*/.
        written = relative.parts[0].startswith(("config-", "_sysconfigdata"))
        if not written and not _NOT_STDLIB.intersection(relative.parts):
            files[relative.as_posix()] = path
    if not files:
        raise DataError(f"this Python keeps no .py files in {root}; name a folder of texts instead")
    return dict(sorted(files.items()))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in PurePosixPath(name).parts)


def _fixed(pattern: Path) -> Path:
    """The folders of a glob before its first wildcard."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _is_path(source: str) -> bool:
    """Whether a source that does not exist was meant to be a path: datasets are called `name`,
    `owner/name` or `owner/name:config`."""
    name = source.partition(":")[0]
    suffixes = {".txt", ".md", ".py", ".csv", *_KINDS, *_COMPRESSED}
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in suffixes


def _kind(source: str, files: dict[str, Path]) -> str:
    kinds = set()
    for path in files.values():
        suffixes = [s.lower() for s in path.suffixes if s.lower() not in _COMPRESSED]
        kinds.add(_KINDS.get(suffixes[-1], "text") if suffixes else "text")
    if len(kinds) > 1:
        raise DataError(
            f"source {source!r} holds {', '.join(sorted(kinds))} files; choose one kind with a "
            "glob such as folder/**/*.jsonl"
        )
    return kinds.pop()


def _texts(files: dict[str, Path]) -> pa.Table:
    texts = [_text(path) for path in files.values()]
    # A file name may hold bytes that are no text, which Arrow refuses.
    names = [os.fsencode(name).decode("utf-8", "replace") for name in files]
    return pa.table({"document": names, "text": pa.array(texts, pa.large_string())})


def _text(path: Path) -> str:
    try:
        with pa.input_stream(str(path)) as stream:  # decompresses .gz, .bz2, .zst, .lz4
            content = stream.read()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it, or "
            "leave it out with a glob such as folder/**/*.txt"
        ) from error


def _load(source: str, kind: str, files: dict[str, Path]) -> datasets.Dataset:
    paths = [glob.escape(str(path)) for path in files.values() if path.stat().st_size]
    if not paths:
        raise DataError(f"source {source!r} is empty")
    try:
        with _no_progress_bars():
            return datasets.load_dataset(kind, data_files=paths, split="train")
    except (datasets.exceptions.DatasetsError, ValueError, OSError, TypeError) as error:
        reason = error.__cause__ or error
        raise DataError(f"source {source!r} cannot be read as {kind}: {reason}") from error
    except StopIteration:  # what datasets makes of files without rows
        raise DataError(f"source {source!r} is empty") from None


def _download(source: str, split: str) -> datasets.Dataset:
    name, _, config = source.partition(":")
    try:
        with _no_progress_bars():
            return datasets.load_dataset(name, config or None, split=split)
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


def _rows(rows: datasets.Dataset, text_column: str | None, source: str) -> pa.Table:
    column = _text_column(rows, text_column, source)
    texts = rows.with_format("arrow")[:][column].cast(pa.large_string())
    return pa.table({"document": list(map(str, range(len(texts)))), "text": texts})


def _text_column(rows: datasets.Dataset, wanted: str | None, source: str) -> str:
    strings = [
        name
        for name, feature in rows.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    choices = f"its columns of text are: {', '.join(strings) or 'none'}"
    if wanted is not None:
        if wanted not in strings:
            raise DataError(f"source {source!r} has no text column {wanted!r}; {choices}")
        return wanted
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise DataError(f"which column of {source!r} is the text? Set text_column; {choices}")
    return strings[0]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """The job shows one of its own."""
    were_shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            datasets.enable_progress_bars()
