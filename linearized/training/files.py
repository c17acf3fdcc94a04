"""Which files a source of text names. Knows names; opens a file only to decompress it.

A document is called by the path of its file below the source, with forward slashes: the name stays
the same from machine to machine.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa

from linearized.errors import DataError

STDLIB = "stdlib"

# site-packages are not the library's; tests hold broken encodings and tables on purpose.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_KINDS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
"""Every other file is read as one text."""
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_ARROW = {".zst": "zstd", ".lz4": "lz4"}
"""What Arrow decompresses."""
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""What reading a file may raise."""


class File(NamedTuple):
    name: str
    """Of the document, if the file is one."""
    path: str
    """As the system calls it: bytes that are no UTF-8 are kept, as surrogates."""
    size: int
    changed: int
    """When it was last written, in nanoseconds."""


def find(source: str) -> list[File] | None:
    """The files of a source that are not empty, sorted by name. None: it is the name of a dataset.

    Links to folders are followed, and no folder is entered twice. Hidden files are left out.

    Raises:
        DataError: there are none.
    """
    if source == STDLIB:
        found = _stdlib()
    else:
        path = Path(source).expanduser()
        if path.is_file():
            found = [(path.name, path)]
        elif path.is_dir():
            found = [(_name(p, path), p) for p in _walk(path)]
        elif glob.has_magic(source):
            root = _fixed(path)
            matches = (Path(name) for name in glob.glob(str(path), recursive=True))
            found = [(_name(p, root), p) for p in matches if p.is_file()]
        elif _is_path(source):
            raise DataError(f"there is no file or folder {source!r}; check the path, or use a glob")
        else:
            return None
    if not found:
        raise DataError(f"source {source!r} matches no files; check the path")
    files = [_file(name, path) for name, path in sorted(found)]
    files = [file for file in files if file.size]
    if not files:
        raise DataError(f"source {source!r} holds no text: all of its {len(found)} files are empty")
    return files


def kind(source: str, files: Iterable[File]) -> str:
    """`text`, `json` or `parquet`.

    Raises:
        DataError: there are several kinds.
    """
    kinds = {_KINDS.get(_suffix(file.path), "text") for file in files}
    if len(kinds) > 1:
        raise DataError(
            f"source {source!r} holds {', '.join(sorted(kinds))} files; choose one kind with a "
            "glob such as folder/**/*.jsonl"
        )
    return kinds.pop()


def is_compressed(path: str) -> bool:
    return Path(path).suffix.lower() in (*_OPENERS, *_ARROW)


def opened(path: str) -> IO[bytes]:
    """The content of a file, decompressed."""
    suffix = Path(path).suffix.lower()
    if suffix in _ARROW:
        raw = pa.PythonFile(open(path, "rb"), mode="r")  # noqa: SIM115, Arrow closes it
        stream: Any = pa.CompressedInputStream(raw, _ARROW[suffix])
        return io.BufferedReader(stream)
    return cast(IO[bytes], _OPENERS.get(suffix, open)(path, "rb"))


def shown(path: str) -> str:
    """A path that can be printed."""
    return os.fsencode(path).decode("utf-8", "replace")


def _file(name: str, path: Path) -> File:
    stat = path.stat()
    return File(name, str(path), stat.st_size, stat.st_mtime_ns)


def _name(path: Path, root: Path) -> str:
    return shown(path.relative_to(root).as_posix())


def _suffix(path: str) -> str:
    """The last one that does not say how the file is compressed."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    while suffixes and suffixes[-1] in (*_OPENERS, *_ARROW):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _walk(root: Path) -> Iterator[Path]:
    """All files below a folder. Real folders come before links, so that what is reached by both
    has its real name."""
    seen: set[tuple[int, int]] = set()
    links = [root]
    while links:
        folders = [links.pop(0)]
        while folders:
            folder = folders.pop()
            stat = folder.stat()
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            for path in sorted(_entries(folder)):
                if path.name.startswith(".") or path.name == "__pycache__":
                    continue
                if path.is_dir():
                    (links if path.is_symlink() else folders).append(path)
                elif path.is_file():
                    yield path


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot list {shown(str(folder))}: {error.strerror}") from error


def _stdlib() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        # What a build wrote about its machine is no source: _sysconfigdata_*, config-*/.
        written = relative.parts[0].startswith(("config-", "_sysconfigdata"))
        if not written and not _NOT_STDLIB.intersection(relative.parts):
            files.append((relative.as_posix(), path))
    if not files:
        raise DataError(f"this Python keeps no .py files in {root}; name a folder of texts instead")
    return files


def _fixed(pattern: Path) -> Path:
    """The folders of a glob before its first wildcard."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _is_path(source: str) -> bool:
    """Whether a source that does not exist was meant to be a path: datasets are called `name`,
    `owner/name` or `owner/name:config`."""
    name = source.partition(":")[0]
    suffixes = {".txt", ".md", ".py", ".csv", *_KINDS, *_OPENERS, *_ARROW}
    many = len(PurePosixPath(name).parts) > 2
    return name.startswith((".", "/", "~")) or many or Path(name).suffix in suffixes
