"""cluster.yaml is what `ray up` accepts, and what its comments promise."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_it(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_node_type"] == "head"
    assert prepared["available_node_types"]["worker"]["max_workers"] == 4
    # Ours take the place of the defaults, which install a nightly Ray into an old conda.
    assert not any("anaconda" in command for command in prepared["worker_setup_commands"])
    assert not any("0.0.0.0" in command for command in prepared["head_start_ray_commands"])


def test_every_start_demands_the_token(config):
    starts = [
        command
        for name in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[name]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "~/.ray/auth_token" in config["file_mounts"].values()


def test_ray_is_pinned_to_a_version_that_the_project_allows(config):
    pins = [command for command in config["setup_commands"] if "ray[train,serve]==" in command]
    assert len(pins) == 1
    pin = pins[0].split("ray[train,serve]==")[1].split("'")[0]
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    requirement = next(line for line in allowed if line.startswith("ray["))
    from packaging.requirements import Requirement

    assert pin in Requirement(requirement).specifier
    assert pin.split(".")[0] == version("ray").split(".")[0]


def test_it_does_not_ship_what_it_should_not(config):
    assert {".git/", ".venv/", "runs/"} <= set(config["rsync_exclude"])
