"""README and docs: links lead somewhere, commands and names exist, README's Python runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

import linearized
from jobs import cli

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS = {field.name for field in dataclasses.fields(linearized.LinearConfig)}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pages
def test_files_that_are_named_exist(page):
    for path in re.findall(
        r"`((?:linearized|jobs|cluster|serve_apps|tests)/[\w./]*)`", page.read_text()
    ):
        assert (ROOT / path).exists(), path


@pages
def test_tests_that_are_named_exist(page):
    for path, name in re.findall(r"`(tests/[\w./]+)::(\w+)`", page.read_text()):
        assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE), name


@pages
def test_modules_that_are_named_exist(page):
    text = page.read_text()
    named = re.findall(r"python -m (jobs\.\w+)", text)
    named += re.findall(r"`((?:jobs|serve_apps|cluster)\.(?!yaml)\w+)", text)
    named += re.findall(r"serve run (serve_apps\.\w+):", text)
    for name in named:
        assert importlib.util.find_spec(name) is not None, name


@pages
def test_recipes_and_fields_that_are_named_exist(page):
    """Every command `python -m jobs.NAME RECIPE key=value …`, without running it."""
    text = page.read_text().replace("\\\n", " ")
    commands = re.findall(r"^ {4,}.*?python -m jobs\.(\w+) +(.*)$", text, re.MULTILINE)
    commands += re.findall(r"`python -m\s+jobs\.(\w+)\s+([^`]+)`", text)
    for name, rest in commands:
        job = importlib.import_module(f"jobs.{name}")
        words = rest.partition("#")[0].split()
        if hasattr(job, "RECIPES") and words[0] in job.RECIPES:
            cli.configured(job.RECIPES, [word for word in words if not word.startswith("--")])
        else:
            others = words[0].startswith(("-", "RECIPE", "settings.yaml"))
            assert others or not hasattr(job, "RECIPES"), f"{name} {rest}"


@pages
def test_settings_that_are_named_exist(page):
    text = page.read_text()
    for call in re.findall(r"LinearConfig\(([^)]*)\)?", text):
        for name in re.findall(r"(\w+)=", call):
            assert name in SETTINGS, name
    for name in re.findall(r"`linearized\.(\w+)", text):
        spec = importlib.util.find_spec(f"linearized.{name}")
        assert hasattr(linearized, name) or spec is not None, name


def test_settings_of_the_app_that_are_named_exist():
    from serve_apps.app import AppArgs

    table = (ROOT / "docs" / "serving.md").read_text().split("## Settings")[1].split("##")[0]
    names = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
    assert len(names) > 8
    assert set(names) <= set(AppArgs.model_fields)


@pages
def test_python_compiles(page):
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")


def test_readme_runs(llama, tmp_path, monkeypatch):
    """Block after block, as somebody would paste them, on a small model."""
    monkeypatch.chdir(tmp_path)
    llama(vocab=32).save_pretrained("path/to/model")
    names: dict[str, object] = {}
    for code in blocks(README, "python"):
        exec(compile(code, "README.md", "exec"), names)
    ids = names["ids"]
    assert isinstance(ids, list) and 0 < len(ids) <= 64
    state = names["state"]
    assert isinstance(state, linearized.DecodeState) and state.length.tolist() == [5]


def test_readme_stays_a_page():
    assert len(README.read_text().splitlines()) <= 150
