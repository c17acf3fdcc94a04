"""Checkpoints of a run: tensors by name and what else is needed to go on, in a folder or in any
storage that pyarrow reaches. Knows names, tensors and files; knows nothing of models or engines.

    <root>/stage-00-step-00000100-3f2a/
        rank-00000-00000.safetensors    some of the tensors, whole; none is in two files
        rank-00000.json                 sizes and checksums of a rank's files
        checkpoint.json                 all of these, and the state; written last

Every rank writes its share, while training goes on. A checkpoint without `checkpoint.json` is not
there, so it is whole or not there at all. Nothing that is read can run code: safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
from pyarrow import ArrowException, fs
from torch import Tensor

from linearized.errors import ConfigError, DataError

FORMAT = "linearized-checkpoint/1"
KEEP = 2
"""Number of checkpoints that are kept: the last may turn out damaged."""
SHARD_BYTES = 2**29
"""A rank's files hold about so much."""
PATIENCE_S = 600.0
"""How long rank 0 waits for the other ranks' files."""

_NAME = re.compile(r"stage-(\d+)-step-(\d+)-\w+")
_INDEX = "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run is: `step` steps of stage number `stage` are done."""

    stage: int
    step: int


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    root: str
    name: str
    position: Position
    state: dict[str, Any]
    """What was given to `Writer.save`."""
    files: dict[str, dict[str, Any]]

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors whose names begin so, without the prefix, in an order that is the same
        everywhere."""
        filesystem, folder = _open(self.root)
        for file in sorted(self.files):
            with tempfile.TemporaryDirectory(prefix="lin-") as scratch:
                path = f"{folder}/{self.name}/{file}"
                if not isinstance(filesystem, fs.LocalFileSystem):
                    fs.copy_files(path, f"{scratch}/{file}", source_filesystem=filesystem,
                                  destination_filesystem=fs.LocalFileSystem())  # fmt: skip
                    path = f"{scratch}/{file}"
                with safetensors.safe_open(path, framework="pt") as opened:
                    for name in sorted(opened.keys()):
                        if name.startswith(prefix):
                            yield name.removeprefix(prefix), opened.get_tensor(name)


def latest(root: str) -> tuple[Checkpoint | None, list[str]]:
    """The last checkpoint that is whole and undamaged, and the names of damaged ones after it."""
    filesystem, folder = _open(root)
    damaged: list[str] = []
    names = sorted(_folders(filesystem, folder), reverse=True)
    for name in names:
        index = _read_json(filesystem, f"{folder}/{name}/{_INDEX}")
        if index is None:
            continue
        if index.get("format") == FORMAT:
            position = Position(stage=index["stage"], step=index["step"])
            found = Checkpoint(root, name, position, index["state"], index["files"])
            if _is_intact(filesystem, f"{folder}/{name}", found.files):
                return found, damaged
        damaged.append(name)
    return None, damaged


def clear(root: str) -> None:
    """Delete all checkpoints."""
    filesystem, folder = _open(root)
    if filesystem.get_file_info(folder).type is fs.FileType.Directory:
        filesystem.delete_dir(folder)


class Writer:
    """Writes one rank's share of each checkpoint, in a thread. All ranks call the same methods in
    the same order."""

    def __init__(self, root: str, *, rank: int, world: int, attempt: str) -> None:
        """`attempt` is the same for all ranks, and another one after a restart: files of workers
        that have died are then nobody's."""
        self._filesystem, self._folder = _open(root)
        self._rank, self._world, self._attempt = rank, world, attempt
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.seconds = 0.0
        """How long training has waited for files."""

    def save(self, at: Position, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Begin to write; the checkpoint before is complete then. `tensors` are this rank's share,
        in memory of their own; `state` is rank 0's.

        Raises:
            DataError: the one before could not be written.
        """
        self.wait()
        text = json.dumps(state)  # as it is now
        name = f"stage-{at.stage:02d}-step-{at.step:08d}-{self._attempt}"
        self._pending = self._thread.submit(self._write, name, at, text, dict(tensors))

    def wait(self) -> None:
        """Until what was begun is written.

        Raises:
            DataError: it could not be.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        began = time.perf_counter()
        try:
            pending.result()
        except (OSError, ArrowException) as error:
            raise DataError(
                f"cannot write a checkpoint to {self._folder}: {error}; make room there, or choose "
                "another storage"
            ) from error
        finally:
            self.seconds += time.perf_counter() - began

    def _write(self, name: str, at: Position, state: str, tensors: dict[str, Tensor]) -> None:
        folder = f"{self._folder}/{name}"
        self._filesystem.create_dir(folder, recursive=True)
        files = {}
        for number, shard in enumerate(_shards(tensors)):
            file = f"rank-{self._rank:05d}-{number:05d}.safetensors"
            data = safetensors.torch.save(shard)
            self._put(f"{folder}/{file}", data)
            files[file] = {"bytes": len(data), "blake2b": _digest(data)}
        self._put_json(f"{folder}/rank-{self._rank:05d}.json", files)
        if self._rank == 0:
            for rank in range(1, self._world):
                files |= self._await(f"{folder}/rank-{rank:05d}.json")
            index = {
                "format": FORMAT,
                "stage": at.stage,
                "step": at.step,
                "state": json.loads(state),
                "files": files,
            }
            self._put_json(f"{folder}/{_INDEX}", index)
            self._prune(name)

    def _await(self, path: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            found = _read_json(self._filesystem, path)
            if found is not None:
                return found
            time.sleep(0.02)
        raise OSError(f"{path} was not written within {PATIENCE_S:.0f} s")

    def _prune(self, last: str) -> None:
        """Delete all before the last ones, and what workers that have died left unfinished there.
        Other ranks may have begun a later one."""
        names = sorted(_folders(self._filesystem, self._folder), reverse=True)
        earlier = [name for name in names if name <= last]
        whole = [name for name in earlier if self._has_index(name)]
        for name in set(earlier) - set(whole[:KEEP]):
            self._filesystem.delete_dir(f"{self._folder}/{name}")

    def _has_index(self, name: str) -> bool:
        info = self._filesystem.get_file_info(f"{self._folder}/{name}/{_INDEX}")
        return bool(info.type is fs.FileType.File)

    def _put_json(self, path: str, value: Any) -> None:
        """Complete or not there at all."""
        self._put(f"{path}.part", json.dumps(value).encode())
        self._filesystem.move(f"{path}.part", path)

    def _put(self, path: str, data: bytes) -> None:
        with self._filesystem.open_output_stream(path) as stream:
            stream.write(data)


def _open(root: str) -> tuple[fs.FileSystem, str]:
    if "://" not in root:
        return fs.LocalFileSystem(), root
    try:
        filesystem, folder = fs.FileSystem.from_uri(root)
    except (ArrowException, OSError, ValueError) as error:
        raise ConfigError(
            f"storage={root} is no folder and no URI that pyarrow reaches: {error}"
        ) from error
    return filesystem, folder


def _folders(filesystem: fs.FileSystem, folder: str) -> list[str]:
    infos = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    return [info.base_name for info in infos if _NAME.fullmatch(info.base_name)]


def _read_json(filesystem: fs.FileSystem, path: str) -> dict[str, Any] | None:
    try:
        with filesystem.open_input_stream(path) as stream:
            found = json.loads(stream.read())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_intact(filesystem: fs.FileSystem, folder: str, files: dict[str, dict[str, Any]]) -> bool:
    def intact(item: tuple[str, dict[str, Any]]) -> bool:
        name, wanted = item
        digest, size = hashlib.blake2b(digest_size=16), 0
        try:
            with filesystem.open_input_stream(f"{folder}/{name}") as stream:
                while chunk := stream.read(2**24):
                    digest.update(chunk)
                    size += len(chunk)
        except OSError:
            return False
        return size == wanted["bytes"] and digest.hexdigest() == wanted["blake2b"]

    with ThreadPoolExecutor(8) as threads:
        return all(threads.map(intact, files.items()))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _shards(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name in sorted(tensors):
        if shard and size + tensors[name].nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensors[name]
        size += tensors[name].nbytes
    if shard:
        yield shard
