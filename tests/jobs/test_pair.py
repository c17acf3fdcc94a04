"""The pair that is measured: the recipes, on so many processors."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

from jobs import data, finetune, layers, pair
from jobs.measure import Timing
from linearized.errors import ConfigError

JOBS = (data, finetune, layers)


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """What each job is given."""
    given = []
    for job in JOBS:
        monkeypatch.setattr(job, "main", given.append)
    monkeypatch.setattr(pair, "session", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr(pair, "RUN", tmp_path)
    for number, file in enumerate(pair.MADE.values()):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        seconds = 60 * number if number else {"read": 7, "total": 30}
        (tmp_path / file).write_text(json.dumps({"seconds": seconds}))
    return given


def test_all_recipes_train_on_the_same_processors(seen):
    pair.main(pair.PairConfig(cpus=3, gpu=False, autocast=False))
    trained = [steps[-1].workers for steps in seen if isinstance(steps, list)]
    assert len(seen) == 8 and len(trained) == 6
    assert {(one.count, one.cpus, one.gpu, one.autocast) for one in trained} == {
        (1, 3, False, False)
    }
    assert next(one for one in seen if isinstance(one, layers.LayersConfig)).threads == 3


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_the_machine_says_how_to_train(seen, monkeypatch, faster):
    def in_turns(contestants, **_):
        assert {run().dtype for run in contestants.values()} == {torch.float32, torch.bfloat16}
        assert torch.get_num_threads() == 2
        return {
            name: Timing.of([1.0 if run().dtype is faster else 2.0])
            for name, run in contestants.items()
        }

    monkeypatch.setattr(pair.measure, "in_turns", in_turns)
    pair.main(pair.PairConfig(gpu=False, drafters=False))
    assert torch.get_num_threads() == 1
    assert len(seen) == 5 and seen[1][-1].workers.autocast is (faster is torch.bfloat16)


def test_it_says_how_long_everything_took(seen, capsys):
    pair.main(pair.PairConfig(gpu=False, autocast=False, drafters=False))
    assert "pair: 10 minutes (data 0.5, teacher 1.0, target 2.0" in capsys.readouterr().out


def test_a_gpu_that_is_not_there(seen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device; use gpu=false"):
        pair.main(pair.PairConfig(gpu=True))
    assert not seen


def test_without_a_processor_nothing_starts():
    with pytest.raises(ConfigError, match="cpus must be at least 1, got 0"):
        pair.PairConfig(cpus=0)
