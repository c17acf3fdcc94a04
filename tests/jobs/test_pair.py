"""The pair that is measured: the recipes, on so many processors."""

from __future__ import annotations

import contextlib

import pytest

from jobs import data, draft, finetune, pair, pretrain
from linearized.errors import ConfigError


def test_all_recipes_train_on_the_same_processors(monkeypatch):
    seen = []
    for job in (data, pretrain, finetune, draft):
        monkeypatch.setattr(job, "main", seen.append)
    monkeypatch.setattr(pair, "session", lambda **_: contextlib.nullcontext())
    pair.main(pair.PairConfig(cpus=3, autocast=False))
    workers = [config.workers for config in seen if not isinstance(config, data.DataConfig)]
    assert len(seen) == 5 and len(workers) == 4
    assert {(one.count, one.cpus, one.autocast) for one in workers} == {(1, 3, False)}


def test_without_a_processor_nothing_starts():
    with pytest.raises(ConfigError, match="cpus must be at least 1, got 0"):
        pair.PairConfig(cpus=0)
