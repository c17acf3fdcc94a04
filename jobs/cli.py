"""The command line of a job: a recipe by name, and fields of its config by `key=value`.

    if __name__ == "__main__":
        cli.run(RECIPES, main, __doc__)

Knows dataclasses and text; knows nothing of what any job does.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import pydantic
import typer
import yaml

from linearized.errors import ConfigError, LinearizedError

Config = TypeVar("Config")


def run(
    recipes: Mapping[str, Callable[[], Config]], job: Callable[[Config], None], doc: str | None
) -> None:
    """Read the command line, make the config, do the job. A LinearizedError becomes one line and
    exit status 2; any other exception is a bug and is shown as one."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.command(context_settings={"help_option_names": []})
    def command(
        recipe: Annotated[str | None, typer.Argument()] = None,
        assignments: Annotated[list[str] | None, typer.Argument()] = None,
        help: Annotated[bool, typer.Option("--help", "-h")] = False,
    ) -> None:
        try:
            if help:
                print(describe(recipes, doc, only=recipe))
                return
            job(override(_recipe(recipes, recipe)(), assignments or []))
        except LinearizedError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None

    app()


def override(config: Config, assignments: Sequence[str]) -> Config:
    """The config with `key=value`s in place of its own values.

    Keys are dotted (`optim.lr=1e-3`, `stages.0.steps=5`), values are YAML and are converted to
    the field's type. All of them are put in at once, so that fields that must agree can change
    together. ConfigError for what is not there or does not fit.
    """
    changes = []
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"expected key=value, got {assignment!r}")
        changes.append((key.split("."), value))
    changed: Config = _changed(config, changes, "")
    return changed


def describe(
    recipes: Mapping[str, Callable[[], Any]], doc: str | None, *, only: str | None = None
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
        config = recipe()
        if type(config) not in seen:
            seen.add(type(config))
            lines += ["", f"Fields, as {name} has them:", *_fields_of(config, "")]
    return "\n".join(lines).lstrip()


Change = tuple[list[str], str]
"""The rest of a dotted key, and the text to put there."""


def _changed(value: Any, changes: Sequence[Change], at: str) -> Any:
    """A dataclass or tuple with changes inside; `at` is its own dotted key and a dot."""
    parts = _parts(value)
    if not parts:
        raise ConfigError(f"{at[:-1]} is {value!r} and has no fields; set it as a whole")
    new: dict[str, Any] = {}
    for name in dict.fromkeys(path[0] for path, _ in changes):
        if name not in parts:
            unknown = f"unknown field {at}{name}; "
            raise ConfigError(f"{unknown}there are {', '.join(at + part for part in parts)}")
        part, hint = parts[name]
        mine = [(path[1:], text) for path, text in changes if path[0] == name]
        whole = [text for path, text in mine if not path]
        inside = [(path, text) for path, text in mine if path]
        if whole:
            part = _converted(whole[-1], hint, at + name)
        new[name] = _changed(part, inside, f"{at}{name}.") if inside else part
    if isinstance(value, tuple):
        return tuple(new.get(str(i), part) for i, part in enumerate(value))
    return dataclasses.replace(value, **new)


def _parts(value: Any) -> dict[str, tuple[Any, Any]]:
    """name → (value, type) of what a dotted key can name inside a value."""
    if isinstance(value, tuple):
        return {str(i): (part, type(part)) for i, part in enumerate(value)}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {}
    hints = typing.get_type_hints(type(value), include_extras=True)
    fields = (field for field in dataclasses.fields(value) if field.init)
    return {field.name: (getattr(value, field.name), hints[field.name]) for field in fields}


def _converted(text: str, hint: Any, key: str) -> Any:
    """The text as a value of the type. What YAML makes of it counts first (numbers, lists, null);
    where that does not fit, the text itself (a name such as `yes` or `2024`)."""
    adapter = pydantic.TypeAdapter(hint)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    _check_keys(value, hint, key)
    reason = ""
    for candidate in (value, text):
        try:
            return adapter.validate_python(candidate)
        except pydantic.ValidationError as error:
            reason = reason or _reason(error)
    raise ConfigError(f"{key} must be {_name(hint)}, got {text!r} ({reason})")


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


def _recipe(recipes: Mapping[str, Callable[[], Config]], name: str | None) -> Callable[[], Config]:
    choices = ", ".join(recipes)
    if name is None:
        raise ConfigError(f"name a recipe: {choices}; --help describes them")
    if name not in recipes:
        raise ConfigError(f"unknown recipe {name!r}; choose from {choices}")
    return recipes[name]


def _fields_of(value: Any, at: str) -> Iterator[str]:
    docs = {} if isinstance(value, tuple) else _docs(type(value))
    for name, (part, hint) in _parts(value).items():
        doc = f"  # {docs[name]}" if name in docs else ""
        inner = part if isinstance(part, tuple) else (part,)
        if inner and all(map(dataclasses.is_dataclass, inner)):
            yield f"  {at}{name}: {_name(hint)}{doc}"
            yield from _fields_of(part, f"{at}{name}.")
        else:
            shown = part if isinstance(part, str | int | float) else str(part)
            yield f"  {at}{name}: {_name(hint)} = {shown}{doc}"


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
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(hint))


def _program() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.rpartition(".")[2] if spec is not None else "NAME"
