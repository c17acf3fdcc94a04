"""JSON schemas as xgrammar goes by them. It ignores what it cannot enforce; that is refused here,
by name and place, so that whatever a guided text says is valid. Knows no tokens.

What is read otherwise than JSON Schema has it only makes fewer texts valid: objects have no
properties beyond those that they name, unless `additionalProperties` allows them; properties come
in the order in which the schema names them; a `pattern` fits the whole string.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from linearized.errors import RequestError
from linearized.speculative.regex import MAX_REPEATS, portable

MAX_DEPTH = 64
"""Of schemas within schemas."""

Schema = dict[str, Any]

_NUMBER = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_STRING = {"minLength", "maxLength", "pattern", "format"}
_ARRAY = {"items", "prefixItems", "unevaluatedItems", "minItems", "maxItems"}
_OBJECT = {
    "properties", "required", "patternProperties", "propertyNames", "additionalProperties",
    "unevaluatedProperties", "minProperties", "maxProperties",
}  # fmt: skip
_OF_TYPE = {
    "integer": _NUMBER, "number": _NUMBER, "string": _STRING, "array": _ARRAY, "object": _OBJECT,
    "boolean": set(), "null": set(),
}  # fmt: skip
_ALONE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
"""Of these xgrammar takes the first that it finds, and nothing beside it."""
_REFUSED = (
    "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies",
    "contains", "minContains", "maxContains", "additionalItems", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
_FORMATS = {
    "email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri",
    "uri-reference", "uri-template", "json-pointer", "relative-json-pointer",
}  # fmt: skip
"""Those that xgrammar enforces; others say nothing about a text."""
_MAX_MULTIPLE, _MAX_WIDTH = 1024, 10_000
"""Up to these xgrammar enforces `multipleOf`: its value, and how many numbers are in the range."""
_COUNTS = (
    "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties",
)  # fmt: skip


def enforceable(source: str) -> str:
    """The schema with all said that xgrammar needs to enforce it.

    Raises:
        RequestError: it is no JSON schema, or says what cannot be enforced.
    """
    try:
        schema = json.loads(source, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the schema is not JSON: {error}") from None
    try:
        _Walk(schema).check(schema, "#", 0)
    except (TypeError, AttributeError) as error:  # a list where an object should be, and the like
        raise RequestError(f"the schema is none: {error}") from None
    return json.dumps(schema, ensure_ascii=False)


class _Walk:
    """Over all of a schema, and whatever it refers to; rewrites it in place."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._seen: set[int] = set()

    def check(self, schema: Any, at: str, depth: int) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise _problem(at, "is no schema but", schema)
        if id(schema) in self._seen:
            return
        self._seen.add(id(schema))
        if depth > MAX_DEPTH:
            raise RequestError(f"the schema is nested more than {MAX_DEPTH} deep; flatten it")
        for keyword in (*_REFUSED, "uniqueItems"):
            if schema.get(keyword, False) is not False:
                raise _problem(at, "has", keyword)
        for keyword in _COUNTS:
            if isinstance(count := schema.get(keyword), int) and count > MAX_REPEATS:
                raise RequestError(
                    f"the schema at {at:.80} has {count:,} in {keyword!r}, {MAX_REPEATS:,} are "
                    "allowed"
                )
        found = [keyword for keyword in _ALONE if keyword in schema]
        if found:
            self._check_alone(schema, found[0], at)
        else:
            self._check_typed(schema, at)
        for place, part in _parts(schema):
            self.check(part, f"{at}/{place}", depth + 1)
        if "oneOf" in schema and not _are_apart(schema["oneOf"]):
            raise _problem(
                at, "has schemas that one value may fit together, as in anyOf, in", "oneOf"
            )
        if isinstance(schema.get("$ref"), str):
            self.check(self._target(schema["$ref"], at), schema["$ref"], depth + 1)

    def _check_alone(self, schema: Schema, keyword: str, at: str) -> None:
        beside = {*_NUMBER, *_STRING, *_ARRAY, *_OBJECT, *_ALONE, "type"} & schema.keys()
        beside -= {keyword}
        values = [schema["const"]] if keyword == "const" else schema.get("enum")
        if keyword in ("const", "enum"):
            if not isinstance(values, list):
                raise _problem(at, "has no list of values in", "enum")
            types = schema.get("type")
            if types is not None and all(_is_one_of(value, types) for value in values):
                beside -= {"type"}
        if beside:
            raise _problem(at, f"has, beside {keyword},", min(beside))
        if keyword == "allOf" and not (
            isinstance(schema[keyword], list) and len(schema[keyword]) == 1
        ):
            raise _problem(at, "has more or less than one schema in", keyword)

    def _check_typed(self, schema: Schema, at: str) -> None:
        types = schema.get("type")
        if types is None:
            if {"properties", "additionalProperties", "unevaluatedProperties"} & schema.keys():
                types = "object"
            elif {"items", "prefixItems", "unevaluatedItems"} & schema.keys():
                types = "array"
            elif found := {*_NUMBER, *_STRING, *_ARRAY, *_OBJECT} & schema.keys():
                raise _problem(at, "gives no type beside", min(found))
            else:
                return
            schema["type"] = types
        for one in [types] if isinstance(types, str) else types:
            if not isinstance(one, str) or one not in _OF_TYPE:
                raise _problem(at, "has the unknown type", one)
            given = {keyword: schema[keyword] for keyword in _OF_TYPE[one] & schema.keys()}
            if one in ("integer", "number"):
                _check_number(given, one, at)
            elif one == "string":
                _check_string(schema, given, at)
            elif one == "array":
                if not {"items", "prefixItems", "unevaluatedItems"} & given.keys():
                    schema["items"] = True
            elif one == "object":
                _check_object(schema, given, at)

    def _target(self, reference: str, at: str) -> Any:
        found = self._root
        if reference != "#" and not reference.startswith("#/"):
            raise _problem(at, "refers outside of the schema, to", reference)
        for part in reference[2:].split("/") if reference != "#" else ():
            if not isinstance(found, dict) or part not in found:
                raise _problem(at, "refers to what is not there,", reference)
            found = found[part]
        return found


def _parts(schema: Schema) -> Iterator[tuple[str, Any]]:
    """The schemas in a schema, and where."""
    for keyword in ("properties", "patternProperties", "$defs", "definitions"):
        held = schema.get(keyword)
        if isinstance(held, dict):
            yield from ((f"{keyword}/{name}", part) for name, part in held.items())
    for keyword in ("anyOf", "oneOf", "allOf", "prefixItems"):
        held = schema.get(keyword)
        if isinstance(held, list):
            yield from ((f"{keyword}/{i}", part) for i, part in enumerate(held))
    single = ("items", "additionalProperties", "unevaluatedItems", "unevaluatedProperties")
    for keyword in (*single, "propertyNames"):
        if keyword in schema:
            yield keyword, schema[keyword]


def _check_number(given: Schema, kind: str, at: str) -> None:
    for keyword, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _problem(at, "has no number in", keyword)
    multiple = given.get("multipleOf")
    if multiple is None:
        return
    lows = [given[k] for k in ("minimum", "exclusiveMinimum") if k in given]
    highs = [given[k] for k in ("maximum", "exclusiveMaximum") if k in given]
    whole = kind == "integer" and 0 < multiple <= _MAX_MULTIPLE and multiple == int(multiple)
    bounded = bool(lows and highs) and max(highs) - min(lows) < _MAX_WIDTH
    if not whole or ((lows or highs) and not bounded):
        raise _problem(
            at,
            f"has what only integers can have, up to {_MAX_MULTIPLE}, without bounds or with both, "
            f"less than {_MAX_WIDTH:,} apart:",
            "multipleOf",
        )


def _check_string(schema: Schema, given: Schema, at: str) -> None:
    if given.get("format") not in _FORMATS:
        given.pop("format", None)
    rules: list[str] = [k for k in ("format", "pattern") if k in given]
    rules += [k for k in ("minLength", "maxLength") if k in given]
    if len(rules) > 1 and rules != ["minLength", "maxLength"]:
        raise _problem(at, f"has, beside {rules[0]},", rules[1])
    if "pattern" in given:
        if not isinstance(given["pattern"], str):
            raise _problem(at, "has no text in", "pattern")
        try:
            schema["pattern"] = portable(given["pattern"])
        except RequestError as error:
            raise RequestError(f"the pattern at {at:.80}: {error}") from None


def _check_object(schema: Schema, given: Schema, at: str) -> None:
    named = given.get("properties") or {}
    required = given.get("required") or []
    if not isinstance(named, dict) or not isinstance(required, list):
        raise _problem(at, "has no object of properties, or no list in", "required")
    for name in required:
        if name not in named:
            raise _problem(
                at, f"does not describe the property {name!r:.60}, which it has in", "required"
            )
    patterns = given.get("patternProperties")
    more = given.get("additionalProperties", given.get("unevaluatedProperties", False))
    for keyword in ("patternProperties", "propertyNames"):
        if keyword in given and named:
            raise _problem(at, "has, beside properties,", keyword)
    if patterns is not None:
        if not isinstance(patterns, dict) or len(patterns) != 1 or more is not False:
            raise _problem(
                at, "has more than one pattern, or other properties, beside", "patternProperties"
            )
        if "propertyNames" in given:
            raise _problem(at, "has, beside patternProperties,", "propertyNames")
        schema["patternProperties"] = {portable(key): one for key, one in patterns.items()}
    elif "propertyNames" in given:
        if given.keys() & {"additionalProperties", "unevaluatedProperties"} and more is not True:
            raise _problem(at, "has, beside additionalProperties,", "propertyNames")
    elif not named and not {"additionalProperties", "unevaluatedProperties"} & given.keys():
        schema["additionalProperties"] = more = True
    free = more is not False or patterns is not None or "propertyNames" in given
    least = given.get("minProperties", 0)
    if free and isinstance(least, int) and least > len(set(required)) + 1:
        raise _problem(
            at, "has other properties, of which one may come twice, beside", "minProperties"
        )


def _are_apart(schemas: Any) -> bool:
    """Can no value fit two of them, by their types or by a property that tells them apart?"""
    if not isinstance(schemas, list) or not all(isinstance(one, dict) for one in schemas):
        return False
    kinds = [_types(one) for one in schemas]
    if all(kinds) and all(not a & b for i, a in enumerate(kinds) for b in kinds[:i]):
        return True
    values = [_values(one) for one in schemas]
    if None not in values and _disjoint(values):  # type: ignore[arg-type]
        return True
    if not all(one.get("type") == "object" for one in schemas):
        return False
    shared = set.intersection(*(set(one.get("required") or ()) for one in schemas))
    for name in shared:
        told = [_values((one.get("properties") or {}).get(name)) for one in schemas]
        if None not in told and _disjoint(told):  # type: ignore[arg-type]
            return True
    return False


def _types(schema: Schema) -> set[str]:
    """What a value's type may be; empty: not known. An integer is a number."""
    types = schema.get("type")
    if types is None and (values := _values(schema)) is not None:
        return {
            name
            for name in ("string", "boolean", "null")
            if all(_is_one_of(v, name) for v in map(json.loads, values))
        }
    if not isinstance(types, (str, list)):
        return set()
    return {
        "number" if one == "integer" else str(one)
        for one in ([types] if isinstance(types, str) else types)
    }


def _values(schema: Any) -> list[str] | None:
    """All values that fit, as JSON."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return [_text(schema["const"])]
    if isinstance(schema.get("enum"), list):
        return [_text(value) for value in schema["enum"]]
    return None


def _text(value: Any) -> str:
    """Equal for equal values; 1.0 is 1."""
    whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if whole else value, sort_keys=True)


def _disjoint(groups: list[list[str]]) -> bool:
    return sum(len(set(group)) for group in groups) == len(
        {one for group in groups for one in group}
    )


def _is_one_of(value: Any, types: Any) -> bool:
    for one in [types] if isinstance(types, str) else types:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        fits = {
            "string": isinstance(value, str),
            "boolean": isinstance(value, bool),
            "null": value is None,
            "array": isinstance(value, list),
            "object": isinstance(value, dict),
            "integer": whole and not isinstance(value, bool),
            "number": isinstance(value, (int, float)) and not isinstance(value, bool),
        }
        if fits.get(one, False):
            return True
    return False


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _problem(at: str, why: str, what: object) -> RequestError:
    return RequestError(
        f"the schema at {at:.80} {why} {what!r:.80}, which guided decoding cannot enforce; leave "
        "that out"
    )
