"""Checkpoints are whole or not there, and damage is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from jobs.train import checkpoints
from jobs.train.checkpoints import KEEP, Position, Writer, clear, latest
from linearized.errors import ConfigError, DataError

WORLD = 2


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    shapes = {"value/a": (3, 4), "value/b": (5,), "exp_avg/a": (3, 4), "exp_avg/b": (5,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def save(root: str, *steps: int, attempt: str = "one", world: int = WORLD) -> None:
    writers = [Writer(root, rank=rank, world=world, attempt=attempt) for rank in range(world)]
    for step in steps:
        every = sorted(tensors(step).items())
        for rank, writer in enumerate(writers):
            share = dict(every[rank::world])
            writer.save(Position(stage=0, step=step), {"step": step, "nan": 1.5}, share)
    for writer in reversed(writers):  # rank 0 waits for the others
        writer.wait()


def read(root: str) -> dict[str, torch.Tensor]:
    found, _ = latest(root)
    assert found is not None
    both = (dict(found.tensors(prefix)).items() for prefix in ("value/", "exp_avg/"))
    return {f"{i}{name}": tensor for i, part in enumerate(both) for name, tensor in part}


@pytest.fixture(params=["", "file://"])
def root(request, tmp_path) -> str:
    return f"{request.param}{tmp_path / 'run'}"


@pytest.mark.parametrize("world", [1, 3])
def test_what_ranks_have_shared_out_is_read_as_one(root, world):
    save(root, 7, world=world)
    found, damaged = latest(root)
    assert found.position == Position(stage=0, step=7) and not damaged
    assert found.state == {"step": 7, "nan": 1.5}
    want = {f"{0 if n.startswith('value') else 1}{n[-1]}": x for n, x in tensors(7).items()}
    assert {name: x.tolist() for name, x in read(root).items()} == {
        name: x.tolist() for name, x in want.items()
    }
    clear(root)
    assert latest(root) == (None, [])
    clear(root)


def test_large_shares_lie_in_several_files(root, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 50)
    save(root, 1)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    assert read(root)["0a"].tolist() == tensors(1)["value/a"].tolist()


def test_the_last_ones_are_kept(root, tmp_path):
    save(root, *range(1, 6))
    folders = sorted(folder.name for folder in (tmp_path / "run").iterdir())
    assert folders == [f"stage-00-step-{step:08d}-one" for step in range(6 - KEEP, 6)]


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [_cut, _flip, Path.unlink])
def test_a_damaged_one_is_named_and_the_one_before_it_read(root, tmp_path, harm):
    save(root, 1, 2)
    harm(sorted((tmp_path / "run").glob("*00002*/*.safetensors"))[0])
    found, damaged = latest(root)
    assert found.position.step == 1 and damaged == ["stage-00-step-00000002-one"]


def test_one_of_another_version_is_passed_over(root, tmp_path):
    save(root, 1)
    [file] = (tmp_path / "run").rglob("checkpoint.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": "other/9"}))
    assert latest(root) == (None, ["stage-00-step-00000001-one"])


def test_an_unfinished_one_is_not_there_and_is_swept_up(root, tmp_path):
    """Rank 1 has been killed before its files were written."""
    save(root, 1)
    dead = Writer(root, rank=0, world=1, attempt="dead")
    dead.save(Position(stage=0, step=2), {}, tensors(2))
    dead.wait()
    folder = tmp_path / "run" / "stage-00-step-00000002-dead"
    (folder / "checkpoint.json").unlink()
    assert latest(root)[0].position.step == 1
    save(root, 2, 3, attempt="two")
    assert not folder.exists() and latest(root)[0].position.step == 3


def test_a_rank_that_is_ahead_loses_nothing(root, tmp_path):
    first = Writer(root, rank=0, world=2, attempt="one")
    second = Writer(root, rank=1, world=2, attempt="one")
    at = [Position(stage=0, step=step) for step in (1, 2)]
    second.save(at[0], {}, {"value/a": torch.ones(2)})
    second.save(at[1], {}, {"value/a": torch.ones(2)})
    second.wait()
    for position in at:
        first.save(position, {}, {"value/b": torch.zeros(2)})
    first.wait()
    assert latest(root)[0].position.step == 2 and set(read(root)) == {"0a", "0b"}


def test_what_cannot_be_written_is_said_with_the_remedy(tmp_path):
    (tmp_path / "run").write_text("a file where a folder should be")
    writer = Writer(str(tmp_path / "run"), rank=0, world=1, attempt="one")
    writer.save(Position(stage=0, step=1), {}, tensors(1))
    with pytest.raises(DataError, match="cannot write a checkpoint to .*choose another storage"):
        writer.wait()


def test_storage_that_nobody_reaches_is_refused():
    with pytest.raises(ConfigError, match="storage=carrier-pigeon://loft is no folder and no URI"):
        latest("carrier-pigeon://loft")


def test_nothing_in_it_can_run_code(root, tmp_path):
    """It is safetensors and JSON, nothing else."""
    save(root, 1)
    kinds = {file.suffix for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert kinds == {".safetensors", ".json"}
    shutil.rmtree(tmp_path / "run")
