"""The cut model of a pruned draft: made anew, marked as ours, and nothing of others removed."""

from __future__ import annotations

from dataclasses import replace

import pytest

import linearized
from jobs.pruning import Pruning, clear, prune
from jobs.run import stamp
from linearized.errors import ConfigError
from linearized.training.pruning import Cut


@pytest.fixture
def step(pair, tmp_path) -> Pruning:
    """Of the conftest's target, whose data has a held-out split only."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(pair / "data" / "held_out")
    return Pruning(
        target=pair / "target", data=tmp_path / "data", out=tmp_path / "draft.cut",
        cut=Cut(layers=2, kv_heads=1, channels=20), blocks=4,
    )  # fmt: skip


def test_what_is_cut_out_and_by_what_tells_prunings_apart(step):
    """The cut model is the student of a run: by its stamp that is known again, or not."""
    other = replace(step, cut=Cut(layers=2, kv_heads=1, channels=8))
    stamps = []
    for one in (step, step, replace(step, blocks=2), other):
        prune(one)
        stamps.append(stamp(step.out))
    assert stamps[0] == stamps[1] and len(set(stamps)) == 3
    assert linearized.load(step.out).config.intermediate_size == 8
    clear(step)
    assert not step.out.exists()
    clear(step)


@pytest.mark.parametrize("mark", [None, "{}", "[]", '{"step": "other"}'])
def test_somebody_elses_folder_is_left_alone(step, mark):
    step.out.mkdir()
    (step.out / "thesis.txt").write_text("years")
    if mark is not None:
        (step.out / "run.json").write_text(mark)
    for work in (prune, clear):
        with pytest.raises(ConfigError, match="draft.cut exists and is not this job's"):
            work(step)
    assert (step.out / "thesis.txt").read_text() == "years"


def test_blocks_are_needed(step):
    with pytest.raises(ConfigError, match="blocks must be at least 1, got 0"):
        replace(step, blocks=0)
