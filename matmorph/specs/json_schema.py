"""The JSON Schema (draft 2020-12) of the spec language, for completion and checks in editors.

Generated from what the loader reads through, methods included. It is stricter than the loader in spelling (`1_000` is no JSON integer) and
knows nothing of what lies between keys (extends, names, the order of methods); the loader has the last word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from matmorph.specs.conditions.table import CONDITIONS
from matmorph.specs.document import document_record
from matmorph.specs.kinds import JsonSchema
from matmorph.specs.typed import Record

DRAFT = "https://json-schema.org/draft/2020-12/schema"

_NULL: JsonSchema = {"type": "null"}
_KEPT = ("version", "extends", "name")  # of the file itself: nothing to remove
_DEEPER = {"$ref": "#/$defs/no_null"}
_NO_NULL: JsonSchema = {"not": _NULL, "additionalProperties": _DEEPER, "items": _DEEPER}
"""Nothing is null, however deep."""


def json_schema(methods: Mapping[str, type[Any]]) -> dict[str, Any]:
    """The schema of a spec file, with the settings of `methods` (classes with `Spec`).

    A spec that extends others may leave out whatever they give, and remove it by null, so only one that extends nothing must be complete.
    """
    document: JsonSchema = _without_required(document_record(methods, {}, []).schema())
    rules, stages = document["properties"]["rules"], document["properties"]["stages"]
    rule = rules["items"]
    rules["items"] = stages["items"]["properties"]["rules"]["items"] = {"$ref": "#/$defs/rule"}
    settings = {name: Record(method.Spec).schema() for name, method in methods.items()}
    complete_rules: JsonSchema = {"items": {"$ref": "#/$defs/complete_rule"}}
    complete_stages = {"items": {"required": ["name", "rules"], "properties": {"rules": complete_rules}}}
    return {
        "$schema": DRAFT,
        "title": "matmorph spec",
        **_removable(document),
        "required": ["version"],
        "if": {"required": ["extends"]},
        "else": {
            "allOf": [_DEEPER],
            "oneOf": [{"required": ["rules"]}, {"required": ["stages"]}],
            "properties": {"rules": complete_rules, "stages": complete_stages},
        },
        "$defs": {
            "no_null": _NO_NULL,
            "rule": _removable(rule),
            "match": _removable(match_schema()),
            "method": _removable(_method({name: _without_required(schema) for name, schema in settings.items()})),
            "alternative": _alternative(),
            **_complete({name: schema.get("required", []) for name, schema in settings.items()}),
        },
    }


def _removable(schema: JsonSchema) -> JsonSchema:
    """The schema with null as a value of every key of every mapping: it removes what an extended spec has there."""

    def change(one: JsonSchema) -> JsonSchema:
        keys = {key: item if key in _KEPT else _or_null(item) for key, item in one["properties"].items()}
        return {**one, "properties": keys}

    found: JsonSchema = _of_mappings(schema, change)
    return found


def _or_null(schema: JsonSchema) -> JsonSchema:
    for key in ("oneOf", "anyOf"):
        if key in schema:
            return {**schema, key: [*schema[key], _NULL]}
    if isinstance(schema.get("type"), str) and not {"enum", "const"} & set(schema):
        return {**schema, "type": [schema["type"], "null"]}
    said: JsonSchema = {key: schema[key] for key in ("description", "default") if key in schema}
    return {**said, "anyOf": [{key: item for key, item in schema.items() if key not in said}, _NULL]}


def _without_required(schema: JsonSchema) -> JsonSchema:
    """The schema with no key of any mapping required."""
    found: JsonSchema = _of_mappings(schema, lambda one: {key: item for key, item in one.items() if key != "required"})
    return found


def _of_mappings(schema: Any, change: Callable[[JsonSchema], JsonSchema]) -> Any:
    """The schema with each part that lists the `properties` of a mapping changed, inner ones first."""
    if isinstance(schema, list):
        return [_of_mappings(item, change) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _of_mappings(item, change) for key, item in schema.items()}
    return change(found) if isinstance(found.get("properties"), dict) else found


def _complete(required: Mapping[str, list[str]]) -> dict[str, JsonSchema]:
    """What rules and methods must have that no base can give. `properties` says nothing of lists, and `items` nothing of mappings."""
    methods = {name: {"required": keys} for name, keys in required.items() if keys}
    rewrite: JsonSchema = {"$ref": "#/$defs/complete_rewrite"}
    return {
        "complete_rule": {"required": ["match", "rewrite"], "properties": {"rewrite": rewrite}},
        "complete_rewrite": {"properties": {**methods, "any_of": {"items": rewrite}}, "items": {"properties": methods}},
    }


def _method(settings: Mapping[str, JsonSchema]) -> JsonSchema:
    closed: JsonSchema = {"type": "object", "properties": dict(settings), "additionalProperties": False}
    return {"description": "one method with its settings", **closed, "minProperties": 1, "maxProperties": 1}


def match_schema() -> JsonSchema:
    properties: dict[str, JsonSchema] = {}
    for key, entry in CONDITIONS.items():
        properties[key] = {**entry.schema(), "description": entry.doc}
        properties |= {name: {**kind.schema(), "description": doc} for name, (kind, doc) in entry.beside.items()}
    owners = {name: [key] for key, entry in CONDITIONS.items() for name in entry.beside}
    closed: JsonSchema = {"type": "object", "properties": properties, "additionalProperties": False, "minProperties": 1}
    return {"description": "conditions that all hold", **closed, "dependentRequired": owners}


def _alternative() -> JsonSchema:
    method: JsonSchema = {"$ref": "#/$defs/method"}
    return {"oneOf": [{"const": "keep"}, method, {"type": "array", "items": method, "minItems": 1}]}


def schema_text(methods: Mapping[str, type[Any]]) -> str:
    """The schema as the file that is shipped beside the library specs."""
    return json.dumps(json_schema(methods), indent=1, ensure_ascii=False) + "\n"
