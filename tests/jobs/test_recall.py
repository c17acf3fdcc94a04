"""The job asks what it says, of the softmax model and of every candidate."""

from __future__ import annotations

import json

import pytest

from jobs import cli, recall
from linearized.errors import ConfigError


def test_it_counts_right_answers(capsys):
    sizes = ["length=40", "pairs=3", "vocab=20", "hidden=16", "heads=2", "steps=2", "batch=2"]
    recall.main(cli.override(recall.recall(), [*sizes, "rows=4", "candidates=[anchored,local]"]))
    out = capsys.readouterr().out
    results = json.loads(out.splitlines()[-1])["results"]
    assert list(results) == ["softmax", "anchored", "local"]
    assert set(results["anchored"]) == {"answers", "without far part", "seconds"}
    assert "without far part" not in results["local"]
    assert all(0 <= found["answers"] <= 1 for found in results.values())
    assert "3 pairs in 40 tokens" in out


def test_what_does_not_fit_is_named():
    with pytest.raises(ConfigError, match="pairs=40 do not fit; .* allow for 31"):
        cli.override(recall.recall(), ["pairs=40"])
    with pytest.raises(ConfigError, match="rows must be at least 1, got 0"):
        cli.override(recall.recall(), ["rows=0"])
    with pytest.raises(ConfigError, match="hidden must be an even multiple of heads = 4, got 60"):
        cli.override(recall.recall(), ["hidden=60"])
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        cli.override(recall.recall(), ["steps=0"])
