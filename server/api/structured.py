"""The form that an answer must have: OpenAI's `response_format`, vLLM's `structured_outputs`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import anyio
from anyio import to_thread
from pydantic import BaseModel, ConfigDict, Field

from prefix_store.errors import InvalidRequest
from server.api import keywords
from server.engine.grammar import Kind, Source

if TYPE_CHECKING:
    from server.api.auth import Caller
    from server.api.services import Services
    from server.engine.grammar import Grammar

ANY_OBJECT: dict[str, Any] = {"type": "object"}
Schema = dict[str, Any]


class JsonSchema(BaseModel):
    """OpenAI's `json_schema`. The answer is held to it whether `strict` or not; `strict` takes no unknown keyword."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    content: Schema = Field(alias="schema")
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema_of_answer(self) -> Schema | None:
        """None is any text. Raises InvalidRequest for none, and for a keyword that a strict one may not have."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise InvalidRequest("response_format: json_schema is missing", param="response_format")
            if self.json_schema.strict:
                keywords.check(self.json_schema.content, "response_format")
            return self.json_schema.content
        return ANY_OBJECT if self.type == "json_object" else None


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`: one of these."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    json_: Schema | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True, min_length=1)] | None = None
    grammar: str | None = None

    @property
    def source(self) -> Source:
        """Raises InvalidRequest unless one thing is asked for."""
        asked = {
            Kind.JSON: self.json_ if self.json_ is not None or not self.json_object else ANY_OBJECT,
            Kind.REGEX: self.regex,
            Kind.CHOICE: self.choice,
            Kind.GRAMMAR: self.grammar,
        }
        given = [Source(kind, _text(what)) for kind, what in asked.items() if what is not None]
        if len(given) != 1:
            names = ", ".join([*asked, "json_object"])
            raise InvalidRequest(f"structured_outputs must have one of {names}", param="structured_outputs")
        return given[0]


def by_newer_name(data: Mapping[str, Any]) -> dict[str, Any]:
    """A body with vLLM's older `guided_json` and the like under the name that they have now."""
    older = {kind.value: data[name] for kind in Kind if data.get(name := f"guided_{kind}") is not None}
    return {**data, "structured_outputs": older} if older else dict(data)


async def load(
    response_format: ResponseFormat | None, outputs: StructuredOutputs | None, services: Services, caller: Caller
) -> Grammar | None:
    """The grammar of what was asked for, None for any text. It is compiled in a thread, one at a time for each tenant.

    Raises InvalidRequest, and Overloaded.
    """
    schema = response_format.schema_of_answer if response_format is not None else None
    if schema is not None and outputs is not None:
        raise InvalidRequest("response_format and structured_outputs are given both", param="structured_outputs")
    if schema is None and outputs is None:
        return None
    param = "response_format" if outputs is None else "structured_outputs"
    source = Source(Kind.JSON, _text(schema)) if outputs is None else outputs.source
    if source.kind is Kind.JSON:
        _check_counts(source.text, param)
    found = services.grammars.find(caller.tenant, source, param)
    if found is not None:
        return found
    # a tenant whose grammars take long waits for itself, not others for it
    async with services.compiling_of.setdefault(caller.tenant, anyio.Lock()):
        compiled = partial(services.grammars.compile, caller.tenant, source, param)
        return await to_thread.run_sync(compiled, limiter=services.compiling)


def _check_counts(schema: str, param: str) -> None:
    """Raises InvalidRequest for a `minProperties` that an answer could reach by saying a name twice.

    A grammar cannot remember names; only those that are required are sure to differ.
    """
    try:
        left = [json.loads(schema)]
    except ValueError:
        return  # the compiler says what is wrong with it
    while left:
        part = left.pop()
        if isinstance(part, dict):
            least, required = part.get("minProperties"), part.get("required")
            named = len(set(map(str, required))) if isinstance(required, list) else 0
            if isinstance(least, int) and least > max(1, named):
                raise InvalidRequest(
                    f"minProperties: {least} is more than the {named} required properties, and others could repeat: "
                    "name them in `required`",
                    param=param,
                )
            left.extend(part.values())
        elif isinstance(part, list):
            left.extend(part)


def _text(asked: Any) -> str:
    return asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False)
