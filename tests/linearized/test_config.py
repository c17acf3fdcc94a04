"""A config says what is wrong with it, and survives being saved."""

from __future__ import annotations

import json

import numpy as np
import pytest

from linearized import LinearConfig
from linearized.errors import ConfigError


def test_it_comes_back_from_json():
    config = LinearConfig(attention="yoso", group=16, layers=[3, 1, 3], bits=4, seed=7)
    again = LinearConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.layers == (1, 3)


def test_settings_of_later_versions_are_named_only_where_they_are_used():
    """What the first version wrote is still what is written, so fingerprints stay what they were:
    of states, prefixes and heads that were made for a model."""
    first = {
        *["attention", "augment", "group", "taps", "layers", "features", "hashes", "bits"],
        *["period", "seed"],
    }
    plain = LinearConfig(attention="hedgehog")
    assert set(plain.to_dict()) == first and LinearConfig.from_dict(plain.to_dict()) == plain
    anchored = LinearConfig.named("anchored")
    assert set(anchored.to_dict()) == first | {"window", "sinks", "bound"}
    assert LinearConfig.from_dict(anchored.to_dict()) == anchored


def test_integers_of_numpy_are_integers():
    config = LinearConfig(attention="grouped", group=np.int64(8), layers=np.array([1, 0]))
    assert type(config.group) is int and config.layers == (0, 1)
    json.dumps(config.to_dict())


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"attention": "softmax"}, "unknown attention 'softmax'; choose from global, grouped"),
        ({"group": 0}, "group must be an integer of at least 1, got 0"),
        ({"taps": 2.5}, "taps must be an integer of at least 1, got 2.5"),
        ({"window": -1}, "window must be an integer of at least 0, got -1"),
        ({"sinks": 1.5}, "sinks must be an integer of at least 0, got 1.5"),
        ({"sinks": 65}, "sinks must be at most group = 64, got 65"),
        ({"attention": "relu", "window": 1}, "window must be 0 with 'relu'.*grouped, hedgehog"),
        ({"attention": "global", "sinks": 1}, "sinks must be 0 with 'global'"),
        ({"bound": 256}, "bound is hedgehog's; leave it out with 'grouped'"),
        ({"attention": "hedgehog", "bound": 0}, "bound must be a number above 0, got 0"),
        ({"attention": "hedgehog", "bound": True}, "bound must be a number above 0, got True"),
        ({"features": True}, "features must be an integer of at least 1, got True"),
        ({"bits": 17}, "bits must be at most 16"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"layers": "012"}, "layers must be a list of layer numbers from 0, got '012'"),
        ({"layers": [0, -1]}, "layers must be a list of layer numbers from 0"),
    ],
)
def test_what_cannot_work_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        LinearConfig(**{"attention": "grouped", **settings})


def test_a_config_of_another_version_names_what_it_does_not_know():
    with pytest.raises(ConfigError, match="unknown setting span .* saved by a newer version"):
        LinearConfig.from_dict({"attention": "grouped", "span": 3})
    with pytest.raises(ConfigError, match="names no `attention`"):
        LinearConfig.from_dict({"group": 3})
