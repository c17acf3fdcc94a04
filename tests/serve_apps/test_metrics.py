"""Names of metrics: documentation and dashboard have those that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from serve_apps.metrics import METRICS, PREFIX, Growth

ROOT = Path(__file__).parents[2]
KINDS = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def exported() -> dict[str, set[str]]:
    """What Prometheus sees, and the labels by which it may be told apart."""
    serves = {"application", "deployment", "replica"}
    return {
        f"ray_{metric.name}{ending}": {*metric.labels, *serves, *(["le"] if ending else [])}
        for metric in METRICS.values()
        for ending in KINDS[metric.kind]
    }


def expressions() -> list[str]:
    board = json.loads((ROOT / "serve_apps" / "grafana.json").read_text())
    found = [one["query"]["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    for panel in board["panels"]:
        found += [target["expr"] for target in panel.get("targets", [])]
    return found


@pytest.mark.parametrize("expression", expressions())
def test_the_dashboard_shows_what_is_exported(expression):
    known = exported()
    named = re.findall(r"ray_\w+", expression)
    assert named and set(named) <= known.keys()
    labels = set(re.findall(r"(\w+)=~?\"", expression))
    for some in re.findall(r"by \(([\w, ]+)\)", expression):
        labels |= set(re.split(r", *", some))
    assert labels <= set().union(*(known[name] for name in named))


def test_the_dashboard_shows_all_that_is_exported():
    shown = set(re.findall(rf"ray_{PREFIX}(\w+)", " ".join(expressions())))
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert shown == {name.removeprefix(PREFIX) for name in METRICS}


def test_panels_do_not_lie_on_each_other():
    board = json.loads((ROOT / "serve_apps" / "grafana.json").read_text())
    taken = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells


def test_the_documentation_names_all_metrics():
    page = (ROOT / "docs" / "serving.md").read_text()
    table = page.split("## Metrics and logs")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` *\| (\w+) *\|", table, re.MULTILINE)
    there = {m.name.removeprefix(PREFIX): m.kind for m in METRICS.values()}
    assert dict(rows) == there and len(rows) == len(there)


def test_growth_is_what_came_since_the_last_look():
    growth = Growth()
    assert growth.of({"a": 1.5, "b": 0.0}) == {"a": 1.5}
    assert growth.of({"a": 1.5, "b": 2.0}) == {"b": 2.0}
