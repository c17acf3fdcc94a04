"""Where a model comes from: folders as they are, GGUF files and the Hub once."""

from __future__ import annotations

import huggingface_hub
import pytest

from jobs import models
from linearized.errors import DataError, ModelError


@pytest.fixture
def converted(monkeypatch):
    """The GGUF files that were converted."""
    files = []

    def convert(file, folder):
        files.append(file)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr("linearized.gguf.convert", convert)
    return files


def test_a_folder_is_a_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "beside.gguf").write_text("")
    assert models.folder_of(tmp_path, tmp_path / "models") == tmp_path
    assert not (tmp_path / "models").exists()


def test_a_gguf_file_is_converted_once(tmp_path, converted):
    file = tmp_path / "in" / "small.Q4.gguf"
    file.parent.mkdir()
    file.write_bytes(b"1")
    cache = tmp_path / "models"
    folder = models.folder_of(file, cache)
    assert folder.parent == cache and folder.name.startswith("small.Q4-")
    assert models.folder_of(str(file), cache) == folder == models.folder_of(file.parent, cache)
    assert converted == [file]
    file.write_bytes(b"22")
    assert models.folder_of(file, cache) != folder, "another file of that name"
    assert sorted(cache.iterdir()) == sorted({folder, models.folder_of(file, cache)})


def test_nothing_is_left_of_a_conversion_that_failed(tmp_path, monkeypatch):
    def convert(file, folder):
        (folder / "half").write_text("")
        raise ModelError("cannot read")

    monkeypatch.setattr("linearized.gguf.convert", convert)
    (tmp_path / "a.gguf").write_text("")
    with pytest.raises(ModelError, match="cannot read"):
        models.folder_of(tmp_path / "a.gguf", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_what_is_no_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _unreachable)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ModelError, match="a.txt is no GGUF file"):
        models.folder_of(tmp_path / "a.txt", tmp_path / "models")
    with pytest.raises(ModelError, match="no model at /no/where; name a Hugging Face folder, a GG"):
        models.folder_of("/no/where", tmp_path / "models")
    with pytest.raises(ModelError, match="no folder owner/name, and the Hub gives .*: no network"):
        models.folder_of("owner/name", tmp_path / "models")
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_text("")
    with pytest.raises(ModelError, match="several GGUF files; name one of a.gguf, b.gguf"):
        models.folder_of(tmp_path, tmp_path / "models")


def _unreachable(name, **_):
    raise ConnectionError("no network")


def test_a_name_is_fetched_once(tmp_path, monkeypatch):
    fetched = []

    def fetch(name, *, local_dir, allow_patterns):
        fetched.append(name)
        (local_dir / "config.json").write_text("{}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    folder = models.folder_of("owner/name", tmp_path)
    assert folder == tmp_path / "owner--name" == models.folder_of("owner/name", tmp_path)
    assert fetched == ["owner/name"]


def test_what_an_earlier_program_has_fetched_does_without_a_network(tmp_path, monkeypatch):
    def fetch(name, *, local_files_only=False, **_):
        if not local_files_only:
            raise ConnectionError("no network")
        return str(tmp_path / "cached")

    (tmp_path / "cached").mkdir()
    (tmp_path / "cached" / "model.safetensors").write_text("")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert models.folder_of("owner/name", tmp_path / "models") == tmp_path / "cached"


def test_somebody_elses_folder_in_the_cache_is_left_alone(tmp_path, converted):
    (tmp_path / "a.gguf").write_text("")
    folder = models.folder_of(tmp_path / "a.gguf", tmp_path / "models")
    (folder / "config.json").rename(folder / "thesis.txt")
    with pytest.raises(DataError, match="holds no model; move it away"):
        models.folder_of(tmp_path / "a.gguf", tmp_path / "models")
    assert (folder / "thesis.txt").exists()
