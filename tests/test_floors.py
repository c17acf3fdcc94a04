"""Who may import whom: design's floors, and one door for each foreign library.

jobs/
serve_apps/
cluster/
linearized/speculative  linearized/training  linearized/evaluation
linearized/models.py
linearized/flash/
linearized/compiled.py
linearized/step.py
linearized/attach.py
linearized/cache.py
linearized/callbacks.py  linearized/fold.py  linearized/probe.py
linearized/context.py  linearized/allocation.py  linearized/rows.py  linearized/support.py
linearized/slots.py  linearized/identity.py
linearized/attention/
linearized/ops/
linearized/tables.py
linearized/state/
linearized/documents.py  linearized/folder.py  linearized/head.py  linearized/rope.py
linearized/tree.py  linearized/near.py  linearized/config.py
linearized/errors.py
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {  # room: floor; a longer name is the closer match
    "jobs": 21,
    "serve_apps": 20,
    "cluster": 19,
    "linearized": 18,
    "linearized.speculative": 17,
    "linearized.training": 17,
    "linearized.evaluation": 17,
    "linearized.models": 16,
    "linearized.flash": 15,
    "linearized.compiled": 14,
    "linearized.step": 13,
    "linearized.attach": 12,
    "linearized.cache": 11,
    "linearized.callbacks": 10,
    "linearized.fold": 9,
    "linearized.probe": 9,
    "linearized.rows": 8,
    "linearized.support": 8,
    "linearized.context": 8,
    "linearized.allocation": 8,
    "linearized.slots": 7,
    "linearized.identity": 6,
    "linearized.attention": 5,
    "linearized.ops": 4,
    "linearized.tables": 3,
    "linearized.state": 2,
    "linearized.medusa": 2,
    "linearized.packing": 2,
    "linearized.documents": 1,
    "linearized.near": 1,
    "linearized.products": 1,
    "linearized.tree": 1,
    "linearized.head": 1,
    "linearized.config": 1,
    "linearized.folder": 1,
    "linearized.rope": 1,
    "linearized.errors": 0,
}
DOORS = {
    "triton": ("linearized.ops",),
    "deepspeed": ("jobs",),
    "ray": ("jobs", "serve_apps", "cluster"),
    "fastapi": ("serve_apps",),
    "lm_eval": ("jobs.harness", "jobs.harness_model"),
    "xgrammar": ("linearized.speculative.guide", "linearized.speculative.compiling"),
}


def sources() -> list[tuple[str, Path]]:
    found = []
    for top in ("linearized", "cluster", "jobs", "serve_apps"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append((name, path))
    return found


def room(module: str) -> str | None:
    matches = [r for r in ROOMS if module == r or module.startswith(r + ".")]
    return max(matches, key=len) if matches else None


def imports(path: Path) -> list[str]:
    """Modules that a file imports anywhere in it; `from a import b` counts as a.b too, if b is
    a room of its own."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.append(full if room(full) != room(node.module or "") else node.module or "")
    return names


@pytest.mark.parametrize("module,path", sources(), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_go_downward_only(module, path):
    mine = room(module)
    for name in imports(path):
        theirs = room(name)
        if theirs is not None and theirs != mine:
            assert ROOMS[theirs] < ROOMS[mine], f"{module} imports {name}"


@pytest.mark.parametrize("module,path", sources(), ids=lambda x: x if isinstance(x, str) else "")
def test_a_foreign_library_has_its_door(module, path):
    for name in imports(path):
        doors = DOORS.get(name.split(".")[0])
        if doors is not None:
            assert any(module == d or module.startswith(d + ".") for d in doors), (
                f"{module} imports {name}"
            )


def test_the_library_needs_neither_ray_nor_deepspeed():
    """Kernels and models are used with torch and transformers alone."""
    script = """
import sys
for name in ("ray", "deepspeed", "fastapi", "datasets", "pyarrow", "xgrammar"):
    sys.modules[name] = None
import linearized, linearized.training.objective, linearized.evaluation.perplexity
import linearized.speculative
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_top_level_holds_what_it_should():
    done = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in done.stdout.split()}
    allowed = {
        "cluster", "linearized", "jobs", "serve_apps", "tests", "pyproject.toml", "cluster.yaml",
        "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "docs", ".ci", ".gitignore",
    }  # fmt: skip
    assert top <= allowed


def test_no_modules_of_speculation_import_each_other_in_a_circle():
    """Engine, drafting, drafters and what is below them: each can be read after those it uses."""
    package = "linearized.speculative"
    files = {name: path for name, path in sources() if name.startswith(package)}
    uses: dict[str, set[str]] = {}
    for name, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                found |= names & files.keys()
        uses[name] = found - {name}
    while uses:
        free = {name for name, used in uses.items() if not used & uses.keys()}
        assert free, f"in a circle: {sorted(uses)}"
        uses = {name: used for name, used in uses.items() if name not in free}
