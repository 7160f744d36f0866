"""The JSON Schema of policy files, made from the models that check them, for editors. Needs no torch.

It describes the file: an entry is a policy's bare name, or one name with its settings. What it cannot say, only
``gradiometer policy check`` does: the order of stages, names that are taken, patterns, and how settings fit together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradiometer.policy.kinds import KINDS
from gradiometer.policy.spec import MOST_ACTIONS, PolicySpec
from gradiometer.records import PIPELINE_SLOTS

__all__ = ["SCHEMA_FILE", "policy_schema"]

SCHEMA_FILE = Path(__file__).with_name("schema.json")
"""The schema as it is shipped."""
DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]


def policy_schema() -> Schema:
    """Return the schema as JSON values, draft 2020-12."""
    whole = PolicySpec.model_json_schema()
    definitions = {
        name: _as_written(schema) for name, schema in whole["$defs"].items() if "kind" not in schema["properties"]
    }
    for kind, model in KINDS.items():
        definitions[kind] = _settings(model.model_json_schema())
    definitions["stage"] = _stage(definitions)
    properties = {name: _as_written(schema) for name, schema in whole["properties"].items()}
    for section in ("pipeline", "shadow"):
        entries = {"type": "array", "items": {"$ref": "#/$defs/stage"}, "maxItems": PIPELINE_SLOTS}
        properties[section] = {"description": whole["properties"][section]["description"], **entries}
    actions = {"type": "array", "items": {"$ref": "#/$defs/ActionSpec"}, "maxItems": MOST_ACTIONS}
    properties["actions"] = {"description": whole["properties"]["actions"]["description"], **actions}
    properties["groups"] = {"description": whole["properties"]["groups"]["description"], "$ref": "#/$defs/GroupsSpec"}
    return {
        "$schema": DIALECT,
        "title": "gradiometer policy",
        "description": whole["description"],
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "anyOf": [
            {"required": [section], "properties": {section: {"minItems": 1}}}
            for section in ("pipeline", "shadow", "actions")
        ],
        "$defs": definitions,
    }


def _stage(definitions: Schema) -> Schema:
    """Return the schema of an entry: one object for all kinds, which editors complete better than a choice of ten."""
    bare = [kind for kind in KINDS if not definitions[kind].get("required")]
    kinds = {}
    for kind in KINDS:
        settings: Schema = {"$ref": f"#/$defs/{kind}"}
        settings = {"anyOf": [settings, {"type": "null"}]} if kind in bare else settings
        kinds[kind] = {"description": definitions[kind]["description"], **settings}
    one = {"additionalProperties": False, "minProperties": 1, "maxProperties": 1}
    return {
        "description": "One policy and its settings.",
        "anyOf": [{"type": "object", "properties": kinds, **one}, {"enum": bare}],
    }


def _settings(schema: Schema) -> Schema:
    """Return the schema of one kind's settings, without the field that names the kind."""
    written = _as_written(schema)
    properties = {name: each for name, each in written["properties"].items() if name != "kind"}
    return {key: value for key, value in written.items() if key != "title"} | {"properties": properties}


def _as_written(schema: Any) -> Any:
    """Return a schema in which a list of texts may be one text alone, without the titles that pydantic makes up."""
    if isinstance(schema, list):
        return [_as_written(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    written = {key: _as_written(value) for key, value in schema.items() if key != "title" or isinstance(value, dict)}
    if written.get("type") == "array" and "items" in written:
        kept = {key: written.pop(key) for key in ("description", "default") if key in written}
        return kept | {"anyOf": [written["items"], written]}
    return written
