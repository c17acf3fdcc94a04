"""The command line of a job: recipes, overrides, and what a mistake looks like."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from jobs.cli import configured, describe, override, run
from linearized.errors import ConfigError, JobError


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Stage:
    steps: int = 10
    optim: Optim = Optim()


@dataclass(frozen=True, kw_only=True)
class Run:
    out: Path
    """Where the result
    goes."""
    name: str = "run"
    seed: int = 0
    fresh: bool = False
    kind: Literal["full", "lora"] = "full"
    model: Path | None = None
    optim: Optim = Optim()
    extra: Optim | None = None
    stages: tuple[Stage, ...] = (Stage(), Stage(steps=20))
    layers: tuple[int, ...] = ()
    made: int = field(default=3, init=False)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Named:
    name: str
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Pair:
    parts: tuple[Named, ...] = (Named(name="a"), Named(name="b"))


FAST = Optim(lr=0.5)


def tiny() -> Run:
    """The smallest there is.

    More on it.
    """
    return Run(out=Path("runs/tiny"))


def large() -> Run:
    return Run(out=Path("runs/large"), name="large")


def stepped(
    *, size: Annotated[int, "How large it is."] = 3, optim: Optim = FAST, out: Path = Path("x")
) -> list[Stage | Run]:
    """Something before the run."""
    return [Stage(steps=size), Run(out=out, optim=optim, name=f"of {size}")]


RECIPES = {"tiny": tiny, "large": large}


@pytest.mark.parametrize(
    ("assignment", "of", "expected"),
    [
        ("seed=7", lambda c: c.seed, 7),
        ("seed=1_000", lambda c: c.seed, 1000),
        ("optim.lr=1e-3", lambda c: c.optim.lr, 1e-3),
        ("optim.lr=2", lambda c: c.optim.lr, 2.0),
        ("optim.betas=[0.8, 0.99]", lambda c: c.optim.betas, (0.8, 0.99)),
        ("layers=[1, 2, 3]", lambda c: c.layers, (1, 2, 3)),
        ("fresh=true", lambda c: c.fresh, True),
        ("fresh=1", lambda c: c.fresh, True),
        ("fresh=no", lambda c: c.fresh, False),
        ("kind=lora", lambda c: c.kind, "lora"),
        ("out=/tmp/a=b", lambda c: c.out, Path("/tmp/a=b")),
        ("out=123", lambda c: c.out, Path("123")),
        ("name=yes", lambda c: c.name, "yes"),
        ("name=2024-01-01", lambda c: c.name, "2024-01-01"),
        ("name=a: {", lambda c: c.name, "a: {"),
        ("name=", lambda c: c.name, ""),
        ("model=runs/teacher", lambda c: c.model, Path("runs/teacher")),
        ("model=null", lambda c: c.model, None),
        ("extra={lr: 0.5}", lambda c: c.extra, Optim(lr=0.5)),
        ("stages.1.steps=5", lambda c: c.stages, (Stage(), Stage(steps=5))),
        ("stages.0.optim.lr=5", lambda c: c.stages[0].optim.lr, 5.0),
        ("stages=[{steps: 1}]", lambda c: c.stages, (Stage(steps=1),)),
    ],
)
def test_override(assignment, of, expected):
    value = of(override(tiny(), [assignment]))
    assert value == expected
    assert type(value) is type(expected)


def test_override_leaves_the_rest_alone():
    assert override(tiny(), []) == tiny()
    changed = override(tiny(), ["optim.lr=0.5", "optim.betas=[0, 0]", "seed=1", "seed=2"])
    assert changed.optim == Optim(lr=0.5, betas=(0.0, 0.0))
    assert changed.seed == 2
    assert changed.stages == tiny().stages
    whole = override(tiny(), ["extra.lr=0.5", "extra={betas: [0, 0]}"])
    assert whole.extra == Optim(lr=0.5, betas=(0.0, 0.0))


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("sed=7", ["sed", "seed", "optim", "stages"]),
        ("made=7", ["unknown field made"]),
        ("optim.lrr=7", ["optim.lrr", "optim.lr", "optim.betas"]),
        ("seed=fast", ["seed", "int", "'fast'"]),
        ("seed=1.5", ["seed", "int", "'1.5'"]),
        ("optim.lr=high", ["optim.lr", "float", "'high'"]),
        ("fresh=perhaps", ["fresh", "bool", "'perhaps'"]),
        ("kind=half", ["kind", "Literal['full', 'lora']", "'half'"]),
        ("optim.betas=[1]", ["optim.betas", "tuple[float, float]", "'[1]'"]),
        ("extra.lr=1", ["extra is None", "as a whole"]),
        ("extra={lrr: 1}", ["extra.lrr", "lr, betas"]),
        ("seed.x=1", ["seed is 0", "as a whole"]),
        ("stages.2.steps=1", ["stages.2", "stages.0, stages.1"]),
        ("seed=-1", ["seed must not be negative, got -1"]),
        ("fresh", ["key=value", "'fresh'"]),
        ("=1", ["key=value"]),
    ],
)
def test_mistakes_are_named(assignment, words):
    with pytest.raises(ConfigError) as error:
        override(tiny(), [assignment])
    for word in words:
        assert word in str(error.value)


def test_help_lists_recipes_and_fields():
    text = describe(RECIPES, "Does nothing, for the test.")
    assert "Does nothing, for the test." in text
    assert "tiny   The smallest there is." in text
    assert "More on it" not in text
    assert "out: Path = runs/tiny  # Where the result goes." in text
    assert "optim.lr: float = 0.001  # Peak learning rate." in text
    assert "model: Path | None = None" in text
    assert "kind: Literal['full', 'lora'] = full" in text
    assert "stages.1.steps: int = 20" in text
    assert "layers: tuple[int, ...] = ()" in text
    assert "made" not in text
    assert "runs/large" not in text
    assert "runs/large" in describe(RECIPES, None, only="large")


def test_parts_of_a_tuple_have_names():
    changed = override(Pair(), ["parts.b.size=5", "parts.0.size=4"])
    assert [part.size for part in changed.parts] == [4, 5]
    with pytest.raises(ConfigError, match="unknown field parts.c; there are parts.0, parts.1"):
        override(Pair(), ["parts.c.size=5"])
    same = Pair(parts=(Named(name="a"), Named(name="a")))
    with pytest.raises(ConfigError, match="unknown field parts.a"):
        override(same, ["parts.a.size=5"])


def test_what_a_recipe_takes_is_set_like_a_field():
    words = ["stepped", "size=5", "optim.betas=[0, 0]", "seed=4", "out=y"]
    first, last = configured({"stepped": stepped}, words)
    assert first == Stage(steps=5)
    assert last == Run(out=Path("y"), name="of 5", optim=Optim(lr=0.5, betas=(0, 0)), seed=4)
    with pytest.raises(ConfigError, match="unknown field sise; there are size, optim, out, out,"):
        configured({"stepped": stepped}, ["stepped", "sise=5"])
    with pytest.raises(ConfigError, match="size must be int, got 'big'"):
        configured({"stepped": stepped}, ["stepped", "size=big"])
    text = describe({"stepped": stepped}, None, only="stepped")
    assert "size: int = 3  # How large it is." in text
    assert "optim.lr: float = 0.5" in text and "seed: int = 0" in text


YAML = """
recipe: tiny
seed: 7
optim: {lr: 1e-2}
extra: {lr: 0.5}
stages:
  1: {steps: 5}
name: "null"
"""
TOML = """
recipe = "tiny"
seed = 7
name = "null"
extra = {lr = 0.5}
[optim]
lr = 1e-2
[stages.1]
steps = 5
"""


@pytest.mark.parametrize(("file", "text"), [("run.yaml", YAML), ("run.toml", TOML)])
def test_a_file_stands_for_settings(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    config = configured(RECIPES, [str(tmp_path / file), "seed=8"])
    want = Run(
        out=Path("runs/tiny"), name="null", seed=8, optim=Optim(lr=1e-2), extra=Optim(lr=0.5),
        stages=(Stage(), Stage(steps=5)),
    )  # fmt: skip
    assert config == want
    other = configured(RECIPES, ["seed=1", "optim.lr=3", str(tmp_path / file)])
    assert (other.seed, other.optim.lr) == (7, 1e-2), "later words go before earlier ones"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "sed: 1", "unknown field sed; there are out"),
        ("a.yaml", "optim: {lrr: 1}", "unknown field optim.lrr; there are optim.lr"),
        ("a.yaml", "extra: {lrr: 1}", "unknown field extra.lrr"),
        ("a.yaml", "recipe: huge", "unknown recipe 'huge'; choose from tiny, large"),
        ("a.yaml", "seed: fast", "seed must be int, got 'fast'"),
        ("a.yaml", "- 1", "must hold keys and values"),
        ("a.yaml", "a: [", "a.yaml is no YAML"),
        ("a.toml", "a = [", "a.toml is no TOML"),
        ("a.toml", "seed = 1\nseed = 2", "a.toml is no TOML"),
        ("a.yaml", "seed: 1\nseed: 2", "a.yaml is no YAML: .*seed"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        configured(
            RECIPES,
            ["tiny", str(tmp_path / name)] if "recipe" not in text else [str(tmp_path / name)],
        )


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*none.yaml: No such file"):
        configured(RECIPES, ["tiny", str(tmp_path / "none.yaml")])
    (tmp_path / "b.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="b.toml is no TOML"):
        configured(RECIPES, ["tiny", str(tmp_path / "b.toml")])


def _call(monkeypatch, *arguments: str, job=lambda config: print(config.seed)) -> int:
    monkeypatch.setattr(sys, "argv", ["job", *arguments])
    with pytest.raises(SystemExit) as exit:
        run(RECIPES, job, "Does nothing.")
    return int(exit.value.code or 0)


def test_run(monkeypatch, capsys):
    assert _call(monkeypatch, "tiny", "seed=5") == 0
    assert capsys.readouterr().out == "5\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["name a recipe", "tiny, large"]),
        (["huge"], ["'huge'", "tiny, large"]),
        (["tiny", "seed=x"], ["seed", "'x'"]),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, arguments, words):
    assert _call(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_dry_run_shows_and_does_nothing(monkeypatch, capsys):
    def called(*words: str, **settings) -> int:
        monkeypatch.setattr(sys, "argv", ["job", *words])
        with pytest.raises(SystemExit) as exit:
            run(RECIPES, lambda config: print("done"), None, **settings)
        return int(exit.value.code or 0)

    assert called("tiny", "--dry-run", "seed=3", plan=lambda config: print(config.seed)) == 0
    assert capsys.readouterr().out == "3\n"
    assert called("tiny", "--dry-run") == 2
    assert capsys.readouterr().err == "error: this job has no --dry-run; leave it out\n"


def test_error_of_the_job_is_one_line_and_a_bug_is_not(monkeypatch, capsys):
    def fails(config: Run) -> None:
        raise JobError("training failed", job="x", status="FAILED")

    assert _call(monkeypatch, "tiny", job=fails) == 2
    assert capsys.readouterr().err == "error: training failed\n"

    def bug(config: Run) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(sys, "argv", ["job", "tiny"])
    with pytest.raises(KeyError):
        run(RECIPES, bug, None)


def test_as_a_program(tmp_path):
    (tmp_path / "small.py").write_text(
        "from dataclasses import dataclass\n"
        "from jobs import cli\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Small:\n"
        "    size: int = 1\n"
        "def one() -> Small:\n"
        "    'Size one.'\n"
        "    return Small()\n"
        "if __name__ == '__main__':\n"
        "    cli.run({'one': one}, lambda config: print(1 / config.size), 'A small job.')\n"
    )

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "small", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    # Each call imports the project, which takes seconds: two of them must do.
    help = call("--help").stdout
    assert "python -m jobs.small RECIPE" in help
    assert "one  Size one." in help
    assert "size: int = 1" in help
    failed = call("one", "size=0")
    assert failed.returncode == 1
    assert "ZeroDivisionError" in failed.stderr
