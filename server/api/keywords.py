"""The keywords of JSON Schema, and those of a schema that are none of them.

JSON Schema passes over a keyword that it does not know, so a misspelt one asks for nothing. OpenAI's `strict` refuses
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prefix_store.errors import InvalidRequest
from server.api import hints

# By what stands behind them: a schema (or, of a few, something else), a list of schemas, schemas by name, or neither.
WITH_SCHEMA = frozenset({
    "additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not",
    "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"
})  # fmt: skip
WITH_LIST = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})
WITH_NAMES = frozenset({"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"})
PLAIN = frozenset({
    "$anchor", "$comment", "$dynamicAnchor", "$dynamicRef", "$id", "$ref", "$schema", "$vocabulary", "const",
    "contentEncoding", "contentMediaType", "default", "dependentRequired", "deprecated", "description", "enum",
    "examples", "exclusiveMaximum", "exclusiveMinimum", "format", "maxContains", "maxItems", "maxLength",
    "maxProperties", "maximum", "minContains", "minItems", "minLength", "minProperties", "minimum", "multipleOf",
    "pattern", "readOnly", "required", "title", "type", "uniqueItems", "writeOnly"
})  # fmt: skip
# OpenAPI's, which says again what `oneOf` says; pydantic writes it
KNOWN = WITH_SCHEMA | WITH_LIST | WITH_NAMES | PLAIN | {"discriminator"}


def check(schema: dict[str, Any], param: str) -> None:
    """Raises InvalidRequest, naming `param`, for a keyword that is none."""
    left: list[tuple[str, Any]] = [("", schema)]
    while left:
        where, part = left.pop()
        if not isinstance(part, dict):
            continue  # true, false, or what the compiler refuses
        for name in part:
            if name not in KNOWN:
                at = f" at {where[:200]}" if where else ""
                said = f"{param}: {name[: hints.LONGEST]!r}{at} is no keyword of JSON Schema"
                raise InvalidRequest(f"{said}{hints.nearest(name, KNOWN)}; strict schemas take no others", param=param)
        left.extend(_below(where, part))


def _below(where: str, schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas in one, and where they stand."""
    for keyword, value in schema.items():
        place = f"{where}.{keyword}" if where else keyword
        if keyword in WITH_NAMES and isinstance(value, dict):
            yield from ((f"{place}.{name[: hints.LONGEST]}", part) for name, part in value.items())
        elif keyword in WITH_LIST and isinstance(value, list):
            yield from ((f"{place}.{number}", part) for number, part in enumerate(value))
        elif keyword in WITH_SCHEMA:
            yield place, value
