"""Schemas are enforced as they stand, or refused by keyword and place."""

from __future__ import annotations

import json

import pytest

from linearized.errors import RequestError
from linearized.speculative.schema import MAX_DEPTH, enforceable

A = {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]}
B = {"type": "object", "properties": {"k": {"const": "b"}}, "required": ["k"]}


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"type": "string", "enum": ["a", "b"], "title": "T", "description": "d", "default": "a"},
        {"type": ["string", "null"], "enum": ["a", None]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}, "description": "d"},
        {"allOf": [{"type": "integer"}]},
        {"oneOf": [{"type": "integer"}, {"type": "string"}]},
        {"oneOf": [A, B]},
        {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
        {"type": ["integer", "string"], "minLength": 2, "maximum": 5},
        {"type": "string", "format": "color", "minLength": 2},
        {"type": "object", "properties": {"not": {"type": "string"}, "$ref": {"type": "null"}}},
        {"type": "array", "uniqueItems": False, "items": {"type": "null"}},
        {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
    ],
)
def test_what_can_be_enforced_stays(schema):
    assert json.loads(enforceable(json.dumps(schema))) == schema


@pytest.mark.parametrize(
    "given,want",
    [
        ({"type": "object"}, {"type": "object", "additionalProperties": True}),
        ({"type": "array"}, {"type": "array", "items": True}),
        ({"properties": {}}, {"properties": {}, "type": "object", "additionalProperties": True}),
        ({"type": "string", "pattern": "^a.$"}, {"type": "string", "pattern": r"a[^\n\r]"}),
    ],
)
def test_what_xgrammar_must_be_told_is_said(given, want):
    assert json.loads(enforceable(json.dumps(given))) == want


@pytest.mark.parametrize(
    "schema,where,what",
    [
        ({"properties": {"a": {"not": {}}}}, "#/properties/a", "not"),
        ({"type": "array", "items": {"if": {}}}, "#/items", "if"),
        ({"type": "array", "uniqueItems": True}, "#", "uniqueItems"),
        ({"type": "array", "contains": {}}, "#", "contains"),
        ({"type": "string", "enum": ["a", 5]}, "#", "type"),
        ({"anyOf": [{}], "properties": {"a": {}}}, "#", "properties"),
        ({"$ref": "#", "minimum": 5}, "#", "minimum"),
        ({"$ref": "https://example.com/a"}, "#", "https://example.com/a"),
        ({"$ref": "#/$defs/b"}, "#", "#/$defs/b"),
        ({"$ref": "#/x/y", "x": {"y": {"not": {}}}}, "#/x/y", "not"),
        ({"allOf": [{}, {}]}, "#", "allOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#", "oneOf"),
        ({"oneOf": [A, A]}, "#", "oneOf"),
        ({"oneOf": [A, {"type": "object"}]}, "#", "oneOf"),
        ({"minimum": 3}, "#", "minimum"),
        ({"required": ["a"]}, "#", "required"),
        ({"type": "number", "multipleOf": 0.1}, "#", "multipleOf"),
        ({"type": "integer", "multipleOf": 2, "minimum": 0}, "#", "multipleOf"),
        ({"type": "string", "format": "date", "pattern": "a"}, "#", "pattern"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "#", "maxLength"),
        ({"type": "object", "required": ["a"]}, "#", "required"),
        (
            {"type": "object", "properties": {"a": {}}, "patternProperties": {"b": {}}},
            "#",
            "patternProperties",
        ),
        ({"type": "object", "patternProperties": {"b": {}, "c": {}}}, "#", "patternProperties"),
        ({"type": "object", "properties": {"a": {}}, "propertyNames": {}}, "#", "propertyNames"),
        ({"type": "object", "minProperties": 2}, "#", "minProperties"),
        ({"type": "integer", "minimum": "5"}, "#", "minimum"),
        ({"type": "any"}, "#", "any"),
        ({"properties": {"a": 5}}, "#/properties/a", "5"),
    ],
)
def test_what_cannot_is_named(schema, where, what):
    with pytest.raises(RequestError) as caught:
        enforceable(json.dumps(schema))
    message = str(caught.value)
    assert f"the schema at {where} " in message and what in message and "cannot enforce" in message


def test_a_pattern_is_checked():
    with pytest.raises(RequestError, match=r"the pattern at #/properties/a: .* position 1"):
        enforceable(json.dumps({"properties": {"a": {"type": "string", "pattern": "(?!a)"}}}))


def test_counts_are_bounded():
    with pytest.raises(
        RequestError, match="at #/items has 10,001 in 'maxLength', 10,000 are allowed"
    ):
        enforceable(json.dumps({"type": "array", "items": {"type": "string", "maxLength": 10_001}}))


def test_depth_is_bounded():
    schema: dict = {"type": "integer"}
    for _ in range(MAX_DEPTH + 1):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="nested more than 64 deep"):
        enforceable(json.dumps(schema))


def test_a_schema_may_refer_to_itself():
    schema = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    }
    assert json.loads(enforceable(json.dumps(schema))) == schema
