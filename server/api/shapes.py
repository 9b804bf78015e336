"""What replies look like, for the OpenAPI document: the handlers make them, and tests hold the two together."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

Object = dict[str, Any]
Ended = Literal["stop", "length", "timeout"]
OpenAIEnded = Literal["stop", "length"]


class ErrorDetail(TypedDict):
    """`code` is stable for clients; `param` names the field, parameter or header at fault, if one is."""

    message: str
    type: str
    param: str | None
    code: str


class Error(TypedDict):
    """Every failure."""

    error: ErrorDetail


class Health(TypedDict):
    """The process answers."""

    status: Literal["ok"]


class Readiness(TypedDict):
    """What of it works; `status` is ready, degraded (without its store), stopping, failed, or loading."""

    status: str
    model: bool
    store: bool


class PrefixName(TypedDict):
    """Which version answered; `tenant` if it is another's."""

    tenant: NotRequired[str]
    id: str
    version: int
    digest: str


class Usage(TypedDict):
    """Tokens. A prefix's virtual tokens are in no sum; `total_tokens` is on OpenAI's routes."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: NotRequired[int]
    virtual_tokens: int


class Timings(TypedDict):
    """Milliseconds from the beginning."""

    time_to_first_token_ms: float | None
    total_ms: float | None


class Logprobs(TypedDict):
    """Parallel lists, an entry a token; the first of an echoed prompt has none. `text_offset` is on OpenAI's route."""

    tokens: list[str]
    token_ids: list[int]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: NotRequired[list[int]]


class GeneratedChoice(TypedDict):
    """One of several."""

    index: int
    text: str
    finish_reason: Ended
    logprobs: NotRequired[Logprobs]


class Generated(TypedDict):
    """The first choice, and all of them where there are several."""

    id: str
    text: str
    finish_reason: Ended
    logprobs: NotRequired[Logprobs]
    prefix: PrefixName | None
    usage: Usage
    timings: Timings
    choices: NotRequired[list[GeneratedChoice]]


class CompletionChoice(TypedDict):
    """`stop_reason` says that `timeout_s` ran out."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: OpenAIEnded
    stop_reason: NotRequired[Literal["timeout"]]


class Completion(TypedDict):
    """OpenAI's, with the prefix."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    prefix: PrefixName | None
    choices: list[CompletionChoice]
    usage: Usage


class ChatMessage(TypedDict):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """`stop_reason` says that `timeout_s` ran out."""

    index: int
    message: ChatMessage
    logprobs: Object | None
    finish_reason: OpenAIEnded
    stop_reason: NotRequired[Literal["timeout"]]


class ChatCompletion(TypedDict):
    """OpenAI's, with the prefix."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    prefix: PrefixName | None
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(TypedDict):
    """The base model, or a prefix, which has a version."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    version: NotRequired[int]
    digest: str


class ModelList(TypedDict):
    """All at once."""

    object: Literal["list"]
    data: list[ModelCard]


class Deleted(TypedDict):
    """`versions` of a prefix, `alias` of one."""

    id: str
    object: str
    deleted: Literal[True]
    versions: NotRequired[list[int]]
    alias: NotRequired[str]


class Tokenized(TypedDict):
    """Of a text or messages `count`, `tokens` and `token_strs`; of an example `examples`."""

    max_model_len: int
    count: NotRequired[int]
    tokens: NotRequired[list[int]]
    token_strs: NotRequired[list[str] | None]
    examples: NotRequired[list[Object]]


class Detokenized(TypedDict):
    """Special tokens included."""

    prompt: str


class TokenizerInfo(TypedDict):
    """What a client needs to know."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class Model(TypedDict):
    """What a prefix must match."""

    id: str
    object: Literal["model"]
    geometry: Object
    base_digest: str
    context_length: int
