"""Where a submitted job writes: never into the folder that Ray deletes after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs import storage
from jobs.storage import placed
from linearized.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path = Path("runs/out")
    data: Path = Path("runs/data")
    model: str = "runs/model"
    name: str = "made"
    storage: str | None = None
    none: Path | None = None


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(storage.ROOT, str(tmp_path / "kept"))
    for name in ("runs/data", "runs/model", "made"):
        (tmp_path / "kept" / name).mkdir(parents=True)
    return tmp_path / "kept"


def test_elsewhere_paths_are_left_alone(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    assert placed(Config()) == Config()


def test_what_a_job_writes_goes_below_the_root(package, root):
    found = placed(Config())
    assert found == Config(
        out=root / "runs/out", data=root / "runs/data", model=str(root / "runs/model")
    )
    assert placed(Config(storage="s3://b/c")).storage == "s3://b/c"
    assert placed(Config(storage="c")).storage == str(root / "c")
    assert placed([Config(), Config(name="last")])[-1].out == root / "runs/out"


def test_what_was_uploaded_goes_before_what_lies_below_the_root(package, root):
    for name in ("runs/data", "runs/model"):
        (package / name).mkdir(parents=True)
    found = placed(Config())
    assert (found.data, found.model) == (package / "runs/data", "runs/model")


def test_without_a_root_a_relative_output_is_refused(package, monkeypatch):
    monkeypatch.delenv(storage.ROOT, raising=False)
    with pytest.raises(ConfigError, match="out=runs/out is relative, .* set LINEARIZED_STORAGE"):
        placed(Config())
    found = placed(Config(out=Path("/shared/out")))
    assert found.out == Path("/shared/out") and found.data == package / "runs/data"


def test_a_root_is_an_absolute_path(package, monkeypatch):
    monkeypatch.setenv(storage.ROOT, "shared")
    with pytest.raises(ConfigError, match="absolute path of a folder .* got 'shared'"):
        placed(Config())
