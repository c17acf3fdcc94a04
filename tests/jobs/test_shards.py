"""Shards: what goes into which follows from the corpus alone, and nothing is lost or doubled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import shards
from jobs.shards import HELD_OUT, TRAIN, Shard, Sides, plan, texts
from linearized.errors import DataError
from linearized.training import corpus, pieces
from linearized.training.corpus import Skipped


@pytest.fixture(params=["text", "lines"])
def source(request, tmp_path, monkeypatch):
    """500 documents of 40 to 840 bytes."""
    monkeypatch.setattr(shards, "SMALLEST", 4000)
    monkeypatch.setattr(pieces, "RANGE", 2000)
    contents = [f"{i:03d}" + "x" * (i * 97 % 800) for i in range(500)]
    if request.param == "text":
        for i, text in enumerate(contents):
            (tmp_path / f"{i:03d}.txt").write_text(text)
    else:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in contents))
    found = corpus.find(str(tmp_path), scratch=tmp_path)
    if not found.is_text:
        found = found.numbered([pieces.count(piece) for piece in found.pieces])
    return found


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9])
def test_every_document_is_in_one_shard_of_its_side(source, fraction):
    sides = Sides.of(source, fraction)
    planned = plan(source, sides, Path("out"))
    assert planned == plan(source, sides, Path("out"))
    assert len({shard.path for shard in planned}) == len(planned)
    found = {TRAIN: [], HELD_OUT: []}
    for shard in planned:
        again = Shard.from_dict(json.loads(json.dumps(shards.asdict(shard))))
        assert again == shard
        of_shard = [name for name, _ in texts(shard, source, sides, Skipped())]
        assert all(sides.of_document(name) == shard.split for name in of_shard)
        found[shard.split] += of_shard
    assert found[TRAIN] + found[HELD_OUT] == sorted(
        found[TRAIN] + found[HELD_OUT], key=lambda n: (sides.of_document(n) == HELD_OUT, len(n), n)
    ), "in their order"
    assert len(set(found[TRAIN] + found[HELD_OUT])) == 500
    assert abs(len(found[HELD_OUT]) / 500 - fraction) < 0.05
    assert sum(shard.split == TRAIN for shard in planned) > 3


def test_shards_of_the_smaller_side_are_as_large(source):
    sides = Sides.of(source, 0.2)
    sizes = {TRAIN: [], HELD_OUT: []}
    for shard in plan(source, sides, Path("out")):
        size = sum(len(text) for _, text in texts(shard, source, sides, Skipped()))
        sizes[shard.split].append(size)
    assert max(sizes[TRAIN]) < 2.5 * 4000
    assert len(sizes[HELD_OUT]) > 1 and max(sizes[HELD_OUT]) > 2000


def test_neither_side_is_empty(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    found = corpus.find(str(tmp_path), scratch=tmp_path)
    for fraction in (1e-9, 1 - 1e-9):
        sides = Sides.of(found, fraction)
        assert {sides.of_document(name) for name in ("a.txt", "b.txt")} == {TRAIN, HELD_OUT}
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match="one document cannot be split"):
        Sides.of(corpus.find(str(tmp_path), scratch=tmp_path), 0.5)
