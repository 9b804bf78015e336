"""The JSON bodies of OpenAI's routes. What a client sends beyond these fields is passed over, as OpenAI's peers do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from prefix_store.errors import InvalidRequest
from server.api import structured
from server.api.schemas import Integer, Integers, SamplingFields
from server.scheduler.sampling_params import MAX_LOGPROBS

Texts = Annotated[list[str], Field(fail_fast=True)]
Tokens = Annotated[list[Integers], Field(fail_fast=True)]


class LenientBody(BaseModel):
    """Base of these bodies. `null` is the same as absent.

    `HARMLESS` has the fields that ask for another kind of answer than this server gives, with the values that do not:
    passing over them would answer something else than what was asked. `WHERE` is what a body's fields stand in, with a
    dot.
    """

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)
    HARMLESS: ClassVar[dict[str, tuple[Any, ...]]] = {}
    WHERE: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _understood(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, harmless in cls.HARMLESS.items():
            if data.get(name) is not None and data[name] not in harmless:
                where = cls.WHERE + name
                raise InvalidRequest(f"{where} is not supported by this server", param=where)
        return {name: value for name, value in data.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        made = super().__get_pydantic_json_schema__(core, handler)
        whole = handler.resolve_ref_schema(made)
        for name, field in whole.get("properties", {}).items():
            arms = field.get("anyOf", [])
            if name not in whole.get("required", ()) and {"type": "null"} not in arms:
                kept = {key: field.pop(key) for key in ("title", "default", "description") if key in field}
                whole["properties"][name] = {**kept, "anyOf": [*(arms or [field]), {"type": "null"}]}
        return made


class StreamOptions(LenientBody):
    """`include_usage`: one more chunk at the end, without choices. `continuous_usage_stats`: usage in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class AnswerBody(SamplingFields, LenientBody):
    """What completions and chat completions have in common. `max_completion_tokens` is a newer name of `max_tokens`."""

    # vLLM's
    HARMLESS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "allowed_token_ids": ([],),
        "bad_words": ([],),
        "guided_whitespace_pattern": (),
        "include_stop_str_in_output": (False,),
        "logits_processors": ([],),
        "prompt_logprobs": (),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "skip_special_tokens": (True,),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
    }

    model: str = Field(min_length=1)
    max_completion_tokens: Integer | None = None
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _by_the_newer_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("prefix_id") is not None:
            # passed over like other unknown fields, it would be answered by the base model
            raise InvalidRequest("here the prefix is named by `model`, not by prefix_id", param="prefix_id")
        if not isinstance(data, dict):
            return data
        newer = data.get("max_completion_tokens")
        return structured.by_newer_name(data if newer is None else {**data, "max_tokens": newer})

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """What is wrong with a field is said of the name that the caller gave it."""
        try:
            yield
        except InvalidRequest as error:
            if self.max_completion_tokens is None or error.param != "max_tokens":
                raise
            newer = "max_completion_tokens"
            raise type(error)(error.message.replace("max_tokens", newer), param=newer) from None


class CompletionBody(AnswerBody):
    """POST /v1/completions. `prompt` is one or several, as texts or as token ids."""

    HARMLESS: ClassVar[dict[str, tuple[Any, ...]]] = {
        **AnswerBody.HARMLESS,
        "suffix": ("",),
        "add_special_tokens": (True,),
        "prompt_embeds": (),
    }

    prompt: str | Integers | Texts | Tokens
    best_of: Integer | None = None
    logprobs: Integer | None = None
    echo: bool = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one. No ids at all are one empty prompt."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)

    @model_validator(mode="after")
    def _best_of_n_is_all(self) -> CompletionBody:
        if self.best_of is not None and self.best_of not in (1, self.n):
            raise InvalidRequest("best_of other than n is not supported by this server", param="best_of")
        return self


class Part(LenientBody):
    """A part of a message's content."""

    type: str
    text: str | None = None


class Message(LenientBody):
    """One message of a conversation."""

    role: str = Field(min_length=1, max_length=64)
    content: str | Annotated[list[Part], Field(fail_fast=True)] = ""
    name: str | None = Field(default=None, max_length=64)

    @property
    def text(self) -> str:
        """The content; its parts stand below one another. Raises InvalidRequest for a part that is no text."""
        if isinstance(self.content, str):
            return self.content
        if any(part.type != "text" for part in self.content):
            raise InvalidRequest("messages: content must be text", param="messages")
        return "\n".join(part.text or "" for part in self.content)

    def to_json(self) -> dict[str, str]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.text} | ({"name": self.name} if self.name is not None else {})


class ChatBody(AnswerBody):
    """POST /v1/chat/completions."""

    HARMLESS: ClassVar[dict[str, tuple[Any, ...]]] = {
        **AnswerBody.HARMLESS,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "web_search_options": (),
        "echo": (False,),
        "add_special_tokens": (False,),
        "documents": ([],),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "modalities": (["text"],),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
    }

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS)

    @property
    def scores(self) -> int | None:
        """`SamplingParams.logprobs`: how many of the likeliest are asked for beside the token itself."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        return self.top_logprobs if self.logprobs else None


class TokenizeBody(LenientBody):
    """POST /tokenize: a text, messages in the chat template, or an example as training takes it."""

    HARMLESS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
    }

    model: str | None = Field(default=None, min_length=1)
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)] | None = None
    example: dict[str, Any] | None = None
    max_length: Annotated[Integer, Field(ge=2)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False


class DetokenizeBody(LenientBody):
    """POST /detokenize."""

    model: str | None = Field(default=None, min_length=1)
    tokens: Integers
