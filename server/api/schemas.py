"""The JSON bodies that come in. Types are strict, and an unknown field is refused with the nearest known one."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from anyio import to_thread
from fastapi import Request
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from prefix_store import examples
from prefix_store.errors import InvalidRequest
from prefix_store.jobs import Objective
from server.api import errors, hints
from server.api.reading import look_through
from server.api.services import services
from server.api.structured import ResponseFormat, StructuredOutputs
from server.scheduler.sampling_params import MAX_BIASES, RANGES

SMALL = 32 * 1024  # bytes of a body that is read at once

# one bound for all integers, so that none can be too large to be turned into a float and compared
Integer = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
# the first wrong item is enough: an error for each of a million would keep every other call waiting
Integers = Annotated[list[Integer], Field(fail_fast=True)]
ALL = -1  # vLLM's word for no top_k
LONGEST_TEXT = 100_000  # characters of a text that comes with a job beside its examples
# as Python writes an id, so that none can be given twice
TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def _examples(given: Any) -> list[dict[str, Any]]:
    """In Python, which lets others in: pydantic would copy a million of them at one go."""
    if not isinstance(given, list) or not given:
        came = examples.kind(given) if given != [] else "an empty list"
        raise PydanticCustomError("examples", "expected a list of one or more examples, got {came}", {"came": came})
    for line, example in enumerate(given, start=1):
        if not isinstance(example, dict):
            told = {"line": line, "expected": examples.EXPECTED, "came": examples.kind(example)}
            raise PydanticCustomError("examples", "line {line}: expected an object {expected}, got {came}", told)
    return given


Examples = Annotated[
    list[dict[str, Any]],
    PlainValidator(_examples, json_schema_input_type=Annotated[list[dict[str, Any]], Field(min_length=1)]),
]


class Body(BaseModel):
    """Base of every JSON body. `null` is the same as absent. `WHERE` is what its fields stand in, with a dot."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)
    WHERE: ClassVar[str] = ""
    # the fields to which null says something
    NULLABLE: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, data: Any) -> Any:
        """A misspelt field would otherwise be its default, and a misspelt prefix_id the bare model."""
        if not isinstance(data, dict):
            return data
        for name in data:
            if name not in cls.model_fields:
                short = cls.WHERE + str(name)[: hints.LONGEST]
                # `model` is an OpenAI client's name for it, which no spelling leads to
                meant = "prefix_id" if name == "model" and "prefix_id" in cls.model_fields else str(name)
                hint = hints.nearest(meant, cls.model_fields)
                raise InvalidRequest(f"unknown field {short!r}{hint}", param=short)
        return {name: value for name, value in data.items() if value is not None or name in cls.NULLABLE}


def _by_token_id(biases: Any) -> Any:
    """JSON knows only texts as keys. Counted before anything else is looked at, for each wrong one is an error."""
    if not isinstance(biases, dict):
        return biases
    if len(biases) > MAX_BIASES:
        expected = f"at most {MAX_BIASES} token ids"
        raise InvalidRequest(f"logit_bias must be {expected}, got {len(biases)}", param="logit_bias")
    odd = next((key for key in biases if not TOKEN_ID.fullmatch(str(key))), None)
    if odd is not None:
        raise InvalidRequest(f"logit_bias: keys must be token ids, got {str(odd)[:80]!r}", param="logit_bias")
    return {int(key): bias for key, bias in biases.items()}


class SamplingFields(BaseModel):
    """What every route that generates takes, by these names. The ranges are `SamplingParams`'s."""

    max_tokens: Integer | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Integer = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[dict[int, float], BeforeValidator(_by_token_id)] = Field(default={})
    seed: Integer | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=16)] = Field(default=[])
    stop_token_ids: Annotated[Integers, Field(max_length=256)] = Field(default=[])
    min_tokens: Integer = 0
    n: int = Field(default=1, ge=1, le=64)
    num_beams: Integer = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    user: str | None = Field(default=None, max_length=256)
    timeout_s: float | None = Field(default=None, gt=0, le=86_400)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        made = super().__get_pydantic_json_schema__(core, handler)
        fields = handler.resolve_ref_schema(made)["properties"]
        for name, (low, high) in RANGES.items():
            for arm in fields[name].get("anyOf", [fields[name]]):
                if arm.get("type") != "null":
                    arm |= {"minimum": ALL if name == "top_k" else low, "maximum": high}
        return made


class GenerateBody(SamplingFields, Body):
    """POST /generate."""

    prompt: str | Integers
    prefix_id: str | None = None
    logprobs: Integer | None = None
    echo: bool = False


class TrainingOptions(Body):
    """How to train. An absent option is `TrainingSpec`'s default, and so are the ranges."""

    method: str | None = None
    objective: Objective | None = None
    virtual_tokens: Integer | None = None
    steps: Integer | None = None
    epochs: Integer | None = None
    batch_size: Integer | None = None
    learning_rate: float | None = None
    schedule: str | None = None
    warmup: float | None = None
    weight_decay: float | None = None
    max_length: Integer | None = None
    init: str | None = None
    init_text: str | None = Field(default=None, min_length=1, max_length=LONGEST_TEXT)
    init_from: str | None = None
    frozen_tokens: Integer | None = None
    bottleneck: Integer | None = None
    feature_map: str | None = None
    context: str | None = Field(default=None, min_length=1, max_length=LONGEST_TEXT)
    template: str | None = None
    seed: Integer | None = None
    patience: Integer | None = None
    publish_anyway: bool | None = None
    stacks: list[str] | None = None

    def options(self) -> dict[str, Any]:
        """What was asked for, without examples."""
        return self.model_dump(exclude={"examples", "validation_examples"}, exclude_none=True)


class TrainBody(TrainingOptions):
    """POST /v1/prefixes/{name}/train. What an example may be, `prefix_store.examples` says."""

    examples: Examples
    validation_examples: Examples | None = None


class EditBody(Body):
    """PATCH /v1/prefixes/{ref}. `ttl_seconds` counts from now; null is for ever."""

    NULLABLE: ClassVar[frozenset[str]] = frozenset({"ttl_seconds"})
    metadata: dict[str, str] | None = None
    pinned: bool | None = None
    ttl_seconds: float | None = None

    def changes(self) -> dict[str, Any]:
        """What is to be changed, as `PrefixStore.edit` takes it."""
        given = self.model_dump(include=self.model_fields_set)
        return {"lifetime" if name == "ttl_seconds" else name: value for name, value in given.items()}


class VersionBody(Body):
    """PUT /v1/prefixes/{name}/aliases/{alias}."""

    version: Annotated[int, Field(ge=1, le=999_999_999)]


class RollbackBody(Body):
    """POST /v1/prefixes/{name}/rollback. No version: the one before the current one."""

    version: Annotated[int, Field(ge=1, le=999_999_999)] | None = None


class SharingBody(Body):
    """PUT /v1/prefixes/{name}/sharing."""

    tenants: Literal["all"] | Annotated[list[str], Field(fail_fast=True, max_length=1000)]


B = TypeVar("B", bound=BaseModel)


async def read(request: Request, kind: type[B]) -> B:
    """Reads a JSON body, a large one off the event loop.

    Raises InvalidRequest with the field, what was expected and what kind of thing came.
    """
    # asked for strictly: a web page elsewhere may make a browser send any body but one of this type
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise InvalidRequest("the body must be JSON: send it with Content-Type: application/json")
    body = await request.body()
    if len(body) <= SMALL:
        return _parse(body, kind)
    return await to_thread.run_sync(_parse, body, kind, limiter=services(request).reading)


def _parse(body: bytes, kind: type[B]) -> B:
    look_through(body)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise errors.invalid(error.errors(include_url=False)) from None
