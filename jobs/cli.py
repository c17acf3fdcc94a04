"""The command line of a job: a recipe by name, and fields of its config by `key=value`.

    if __name__ == "__main__":
        cli.run(RECIPES, main, __doc__)

A recipe is a function that returns a config: a dataclass, or a list of steps of which the last is
the one that is configured. What the function takes can be set like a field. Knows dataclasses and
text; knows nothing of what any job does.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import textwrap
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import typer
import yaml

from jobs import storage
from linearized.errors import ConfigError, LinearizedError

Config = TypeVar("Config")
Recipe = Callable[..., Config]

FILES = (".yaml", ".yml", ".toml")
"""Endings of files that may stand for `key=value`s."""


def run(
    recipes: Mapping[str, Recipe[Config]],
    job: Callable[[Config], None],
    doc: str | None,
    *,
    plan: Callable[[Config], None] | None = None,
) -> None:
    """Read the command line, make the config, do the job; with --dry-run do `plan` instead. A
    LinearizedError becomes one line and exit status 2; any other exception is a bug and is shown as
    one."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.command(context_settings={"help_option_names": []})
    def command(
        words: Annotated[list[str] | None, typer.Argument()] = None,
        help: Annotated[bool, typer.Option("--help", "-h")] = False,
        dry_run: Annotated[bool, typer.Option("--dry-run")] = False,
    ) -> None:
        try:
            if help:
                print(describe(recipes, doc, only=words[0] if words else None))
                return
            if dry_run and plan is None:
                raise ConfigError("this job has no --dry-run; leave it out")
            config = storage.placed(configured(recipes, words or []))
            (plan if dry_run and plan is not None else job)(config)
        except LinearizedError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None

    app()


def configured(recipes: Mapping[str, Recipe[Config]], words: Sequence[str]) -> Config:
    """What a command line asks for: the name of a recipe, then `key=value`s and YAML or TOML files
    of such. A file may also name the recipe, as `recipe`. Later words go before earlier ones.

    Raises:
        ConfigError: a word is neither, or names what is not there or does not fit.
    """
    name: str | None = None
    changes: list[Change] = []
    for word in words:
        key, equals, value = word.partition("=")
        if key and equals:
            changes.append((key.split("."), _Text(value)))
        elif not equals and Path(word).suffix in FILES:
            settings = _read(Path(word))
            name = settings.pop("recipe", None) or name
            changes += [(str(key).split("."), value) for key, value in settings.items()]
        elif name is None and not equals:
            name = word
        else:
            raise ConfigError(f"expected key=value, got {word!r}")
    return _made(_recipe(recipes, name), changes)


def override(config: Config, assignments: Sequence[str]) -> Config:
    """The config with `key=value`s in place of its own values.

    Keys are dotted (`optim.lr=1e-3`, `stages.0.steps=5`), values are YAML and are converted to
    the field's type. A part of a tuple is named by its number, or by its first field if that is a
    name (`stages.transfer.steps=5`). All of them are put in at once, so that fields that must agree
    can change together. ConfigError for what is not there or does not fit.
    """
    return configured({"": lambda: config}, ["", *assignments])


def describe(
    recipes: Mapping[str, Recipe[Any]], doc: str | None, *, only: str | None = None
) -> str:
    """What --help prints: the recipes, and the fields of each kind of config with its defaults."""
    lines = [inspect.cleandoc(doc or ""), ""]
    lines += [f"Usage: python -m jobs.{_program()} RECIPE [key=value …]", "", "Recipes:"]
    width = max(map(len, recipes))
    for name, recipe in recipes.items():
        first = (inspect.getdoc(recipe) or "").partition("\n")[0]
        lines.append(f"  {name:<{width}}  {first}".rstrip())
    shown = {only: _recipe(recipes, only)} if only else recipes
    seen: set[type] = set()
    for name, recipe in shown.items():
        config, own = _configured_part(recipe()), _parameters(recipe)
        if only and own:
            lines += ["", f"Settings of {name}:", *_lines_of(own, {}, "")]
        if type(config) not in seen:
            seen.add(type(config))
            lines += ["", f"Fields, as {name} has them:", *_fields_of(config, "")]
    return "\n".join(lines).lstrip()


class _Text(str):
    """What stands on a command line. What it means, YAML and the field's type say."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: one of the two is a mistake."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [str(key) for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"{twice[0]} stands there twice")
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return found


Change = tuple[list[str], Any]
"""The rest of a dotted key, and what to put there: a `_Text`, or a value out of a file."""

Parts = Mapping[str, tuple[Any, Any]]
"""name → (value, type) of what a dotted key can name inside something."""


def _read(file: Path) -> dict[str, Any]:
    """The settings in a YAML or TOML file."""
    try:
        text = file.read_text()
        toml = file.suffix == ".toml"
        found = tomllib.loads(text) if toml else yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file} is no {file.suffix[1:].upper()}: {reason}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} must hold keys and values, as `seed: 1`, got {found!r}")
    return found


def _made(recipe: Recipe[Config], changes: Sequence[Change]) -> Config:
    """What a recipe returns, with changes: of what it takes, and of what it returns."""
    own = _parameters(recipe)
    mine = [change for change in changes if change[0][0] in own]
    rest = [change for change in changes if change[0][0] not in own]
    config = recipe(**_new(own, mine, ""))
    if not rest:
        return config
    if isinstance(config, list):
        changed: Any = [*config[:-1], _changed(config[-1], rest, "", own)]
    else:
        changed = _changed(config, rest, "", own)
    return typing.cast(Config, changed)


def _parameters(recipe: Recipe[Any]) -> Parts:
    """What a recipe takes, with its defaults."""
    found = inspect.signature(recipe, eval_str=True).parameters.values()
    return {one.name: (one.default, one.annotation) for one in found}


def _configured_part(config: Any) -> Any:
    return config[-1] if isinstance(config, list) else config


def _changed(value: Any, changes: Sequence[Change], at: str, also: Parts | None = None) -> Any:
    """A dataclass or tuple with changes inside; `at` is its own dotted key and a dot. `also` is
    what else a key could have named."""
    parts = _parts(value)
    if not parts:
        raise ConfigError(f"{at[:-1]} is {value!r} and has no fields; set it as a whole")
    numbers = _numbers(value) if isinstance(value, tuple) else {}
    changes = [([numbers.get(path[0], path[0]), *path[1:]], given) for path, given in changes]
    for path, _ in changes:
        if path[0] not in parts:
            known = ", ".join(at + part for part in (*(also or {}), *parts))
            raise ConfigError(f"unknown field {at}{path[0]}; there are {known}")
    new = _new(parts, changes, at)
    if isinstance(value, tuple):
        return tuple(new.get(str(i), part) for i, part in enumerate(value))
    return dataclasses.replace(value, **new)


def _new(parts: Parts, changes: Sequence[Change], at: str) -> dict[str, Any]:
    """The parts that change, as they then are."""
    new: dict[str, Any] = {}
    for name in dict.fromkeys(path[0] for path, _ in changes):
        part, hint = parts[name]
        inside: list[Change] = []
        for path, given in changes:
            if path[0] != name:
                continue
            if path[1:]:
                inside.append((path[1:], given))
            elif isinstance(given, dict) and _parts(part):  # out of a file: fields of what is there
                inside += [(str(key).split("."), inner) for key, inner in given.items()]
            else:
                part = _converted(given, hint, at + name)
        new[name] = _changed(part, inside, f"{at}{name}.") if inside else part
    return new


def _parts(value: Any) -> Parts:
    if isinstance(value, tuple):
        return {str(i): (part, type(part)) for i, part in enumerate(value)}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {}
    hints = typing.get_type_hints(type(value), include_extras=True)
    fields = (field for field in dataclasses.fields(value) if field.init)
    return {field.name: (getattr(value, field.name), hints[field.name]) for field in fields}


def _numbers(value: tuple[Any, ...]) -> dict[str, str]:
    """Names of a tuple's parts → their numbers. A part's name is its first field, if that is a text
    that no other part has."""
    names = []
    for part in value:
        fields = dataclasses.fields(part) if dataclasses.is_dataclass(part) else ()
        names.append(getattr(part, fields[0].name) if fields else None)
    return {
        name: str(i)
        for i, name in enumerate(names)
        if isinstance(name, str) and names.count(name) == 1
    }


def _converted(given: Any, hint: Any, key: str) -> Any:
    """The given as a value of the type. What YAML makes of a text counts first (numbers, lists,
    null); where that does not fit, the text itself (a name such as `yes` or `2024`)."""
    adapter = pydantic.TypeAdapter(hint)
    candidates = [given]
    if isinstance(given, _Text):
        try:
            candidates = [yaml.safe_load(given), str(given)]
        except yaml.YAMLError:
            candidates = [str(given)]
    _check_keys(candidates[0], hint, key)
    reason = ""
    for candidate in candidates:
        try:
            return adapter.validate_python(candidate)
        except pydantic.ValidationError as error:
            reason = reason or _reason(error)
    shown = str(given) if isinstance(given, _Text) else given
    raise ConfigError(f"{key} must be {_name(hint)}, got {shown!r} ({reason})")


def _check_keys(value: Any, hint: Any, key: str) -> None:
    """Pydantic passes over keys that a dataclass does not have; a typo must not pass."""
    classes = [kind for kind in _classes(hint) if dataclasses.is_dataclass(kind)]
    if not isinstance(value, dict) or not classes:
        return
    known = dict.fromkeys(field.name for kind in classes for field in dataclasses.fields(kind))
    for name in value:
        if name not in known:
            raise ConfigError(f"unknown field {key}.{name}; there are {', '.join(known)}")


def _classes(hint: Any) -> Iterator[Any]:
    yield hint
    for inner in typing.get_args(hint):
        yield from _classes(inner)


def _reason(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(step) for step in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _recipe(recipes: Mapping[str, Recipe[Config]], name: str | None) -> Recipe[Config]:
    choices = ", ".join(recipes)
    if name is None:
        raise ConfigError(f"name a recipe: {choices}; --help describes them")
    if name not in recipes:
        raise ConfigError(f"unknown recipe {name!r}; choose from {choices}")
    return recipes[name]


def _fields_of(value: Any, at: str) -> Iterator[str]:
    docs = {} if isinstance(value, tuple) else _docs(type(value))
    yield from _lines_of(_parts(value), docs, at)


def _lines_of(parts: Parts, docs: Mapping[str, str], at: str) -> Iterator[str]:
    for name, (part, hint) in parts.items():
        said = docs.get(name) or _said(hint)
        doc = f"  # {said}" if said else ""
        inner = part if isinstance(part, tuple) else (part,)
        if inner and all(map(dataclasses.is_dataclass, inner)):
            yield f"  {at}{name}: {_name(hint)}{doc}"
            yield from _fields_of(part, f"{at}{name}.")
        else:
            shown = part if isinstance(part, str | int | float) else str(part)
            yield f"  {at}{name}: {_name(hint)} = {shown}{doc}"


def _said(hint: Any) -> str:
    """The sentence that a type is annotated with."""
    found = [text for text in getattr(hint, "__metadata__", ()) if isinstance(text, str)]
    return " ".join(" ".join(found).split())


def _docs(kind: type) -> dict[str, str]:
    """The string that stands under each field, which Python itself does not keep."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # made at run time, or its file is gone
            continue
        body = typing.cast(ast.ClassDef, tree.body[0]).body
        for field, below in itertools.pairwise(body):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


def _name(hint: Any) -> str:
    """The name of a type, as it is written in code."""
    if hasattr(hint, "__metadata__"):
        return _name(hint.__origin__)
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(hint))


def _program() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.rpartition(".")[2] if spec is not None else "NAME"
