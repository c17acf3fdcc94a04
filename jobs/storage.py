"""Where a submitted job reads and writes. Knows paths; knows nothing of what lies there.

Ray unpacks a submitted job's files into a folder of its own, and deletes that after the job. A
relative path of an output would go with it. So it counts from a root that stays.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

from linearized.errors import ConfigError

Config = TypeVar("Config")

ROOT = "LINEARIZED_STORAGE"
"""The environment variable that names the root: a folder that all nodes see."""
OUTPUTS = ("out", "run", "storage")
"""Fields that name what a job writes."""
INPUTS = ("model", "tokenizer", "source", "text")
"""Fields that may name a folder or file to read, although they are texts."""


def placed(config: Config) -> Config:
    """The config of a job, or the list of its steps, with absolute paths if this is a job that was
    submitted with its files: outputs below the root, inputs below the root or among those files.

    Raises:
        ConfigError: an output has a relative path, and no root is set.
    """
    here = package()
    if here is None:
        return config
    steps = config if isinstance(config, list) else [config]
    found: Any = [_placed(step, here) for step in steps]
    placed: Config = found if isinstance(config, list) else found[0]
    return placed


def package() -> Path | None:
    """The folder that Ray has unpacked this job's files into, if it has been submitted."""
    here = Path.cwd()
    return here if "working_dir_files" in here.parts else None


def _placed(step: Any, here: Path) -> Any:
    root = _root()
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(step):
        value = getattr(step, field.name)
        if field.name in OUTPUTS and isinstance(value, str | Path):
            if "://" not in str(value) and not Path(value).is_absolute():
                changes[field.name] = type(value)(_output(Path(value), field.name, root))
        elif isinstance(value, Path) and not value.is_absolute():
            changes[field.name] = _input(value, root, here)
        elif field.name in INPUTS and isinstance(value, str) and _is_below(value, root, here):
            changes[field.name] = f"{root}/{value}"
    return dataclasses.replace(step, **changes) if changes else step


def _is_below(text: str, root: Path | None, here: Path) -> bool:
    """Is a text a path of something below the root, and of nothing that was uploaded?"""
    return bool(text and root) and not (here / text).exists() and Path(root or "", text).exists()


def _root() -> Path | None:
    given = os.environ.get(ROOT)
    if not given:
        return None
    if not Path(given).is_absolute():
        raise ConfigError(
            f"{ROOT} must be an absolute path of a folder that all nodes see, got {given!r}"
        )
    return Path(given)


def _output(path: Path, name: str, root: Path | None) -> Path:
    if root is None:
        raise ConfigError(
            f"{name}={path} is relative, and Ray deletes this job's own folder after it; name an "
            f"absolute path, or set {ROOT} to a folder that all nodes see"
        )
    return root / path


def _input(path: Path, root: Path | None, here: Path) -> Path:
    """An upload goes before what lies below the root: it came with this command."""
    if root is None or (here / path).exists():
        return here / path
    return root / path
