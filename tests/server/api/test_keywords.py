from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from prefix_store.errors import InvalidRequest
from server.api import keywords


def check(schema: Any) -> None:
    keywords.check(schema, "response_format")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"maxLenght": 3}, "'maxLenght' is no keyword of JSON Schema; did you mean 'maxLength'?"),
        ({"type": "object", "properties": {"a": {"mininum": 1}}}, "'mininum' at properties.a is no keyword"),
        ({"anyOf": [{}, {"items": {"colour": 1}}]}, "'colour' at anyOf.1.items is no keyword of JSON Schema; strict"),
        ({"items": [{"x": 1}]}, "'x' at items.0 "),
        (
            {"$defs": {"a": {"additionalProperties": {"propertees": {}}}}},
            "'propertees' at $defs.a.additionalProperties ",
        ),
        ({"x-guidance": {"lenient": True}}, "'x-guidance' is no keyword"),
        ({"nullable": True}, "'nullable' is no keyword"),
        ({"x" * 1000: 1}, "'" + "x" * 80 + "' is no keyword"),
    ],
)
def test_a_keyword_that_is_none_is_named_with_its_place_and_the_nearest(schema: Any, said: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        check(schema)
    assert said in error.value.message
    assert error.value.message.startswith("response_format: ")
    assert error.value.param == "response_format"


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object", "properties": {"colour": {"type": "string"}, "maxLenght": True}},
        {"enum": [{"colour": 1}], "const": {"x": 1}, "default": {"y": 1}, "examples": [{"z": 1}]},
        {"dependentRequired": {"colour": ["x"]}, "required": ["colour"]},
        {"additionalProperties": False, "items": True, "dependencies": {"a": ["b"], "c": {"type": "null"}}},
        {"patternProperties": {"^x-": {}}, "definitions": {"odd name": {"not": {}}}},
    ],
)
def test_what_a_caller_names_is_no_keyword(schema: Any) -> None:
    check(schema)


class Cat(BaseModel):
    """A cat."""

    kind: Literal["cat"]
    lives: int = Field(default=9, ge=0, multiple_of=1, examples=[7])


class Dog(BaseModel):
    kind: Literal["dog"]
    tags: dict[str, list[str]] = Field(deprecated=True, min_length=1)


class Pets(BaseModel):
    pets: list[Cat | Dog] = Field(min_length=1, max_length=3)
    best: Cat | Dog | None = Field(default=None, discriminator="kind", description="Which?")
    pair: tuple[int, str] = Field(title="Two")


def test_what_pydantic_writes_is_known() -> None:
    check(Pets.model_json_schema())
