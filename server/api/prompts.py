"""What the model reads after the prefix, as ids and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anyio import to_thread

from prefix_store.errors import ContextLengthExceeded, InvalidRequest
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.prompt import encode, render, render_chat
from server.api.services import Services
from server.text import decode

# No tokenizer in use has longer tokens than this, in characters; the longest are runs of blanks.
LONGEST_TOKEN = 256


@dataclass(frozen=True)
class Prompt:
    """`text` is what an echo shows: as it was given, in its template, or decoded from the ids that were given."""

    ids: tuple[int, ...]
    text: str


def fields(ids: tuple[int, ...], frozen: FrozenModel) -> dict[str, Any]:
    """The fields of a `GenerationRequest` that a prompt and the model decide.

    A prompt is what an encoder-decoder model's encoder reads; its answer begins, and ends, by the model's own rules.
    """
    if not frozen.is_encoder_decoder:
        return {"prompt_ids": ids}
    rules = {"last_id": frozen.last_id, "banned_ids": frozen.banned_ids}
    return {"prompt_ids": frozen.start_ids, "source_ids": ids, **rules}


async def from_text(text: str, template: str | None, services: Services) -> Prompt:
    """Encodes a text in a thread, for a long one takes a while. One that could never fit is not even encoded."""
    whole = render(text, template)
    _check_length(whole, services, "prompt")
    ids = await to_thread.run_sync(encode, services.frozen.tokenizer, whole, limiter=services.tokenizing)
    return Prompt(tuple(ids), whole)


def from_ids(ids: list[int], services: Services) -> Prompt:
    """Takes ids as they are; none at all become BOS. Raises InvalidRequest for an id the model does not have."""
    context = services.frozen.context_length
    if len(ids) > context:
        raise ContextLengthExceeded(f"{_limit(context)}; the prompt alone has {len(ids)}", param="prompt")
    ids = ids or encode(services.frozen.tokenizer, "")
    check_ids(ids, services, "prompt")
    return Prompt(tuple(ids), decode(services.frozen.tokenizer, ids))


async def from_each(asked: Sequence[str | list[int]], template: str | None, services: Services) -> list[Prompt]:
    """Several prompts, texts or ids, as the two functions above take them, all in a thread."""
    return [
        await from_text(prompt, template, services)
        if isinstance(prompt, str)
        else await to_thread.run_sync(from_ids, prompt, services, limiter=services.tokenizing)
        for prompt in asked
    ]


async def from_chat(messages: Sequence[Mapping[str, Any]], services: Services) -> Prompt:
    """Messages in the chat template, which brings its own special tokens. Raises also what `render_chat` raises."""
    return await to_thread.run_sync(_from_chat, messages, services, limiter=services.tokenizing)


def check_ids(ids: Sequence[int], services: Services, param: str) -> None:
    """Raises InvalidRequest for an id that the model does not have."""
    last = services.frozen.vocabulary_size - 1
    odd = min(ids, default=0) if min(ids, default=0) < 0 else max(ids, default=0)
    if not 0 <= odd <= last:
        raise InvalidRequest(f"{param}: token ids must be from 0 to {last}, got {odd}", param=param)


def _from_chat(messages: Sequence[Mapping[str, Any]], services: Services) -> Prompt:
    tokenizer = services.frozen.tokenizer
    text = render_chat(tokenizer, messages, services.chat_template)
    _check_length(text, services, "messages")
    return Prompt(tuple(encode(tokenizer, text, special_tokens=False)), text)


def _check_length(text: str, services: Services, param: str) -> None:
    context = services.frozen.context_length
    if len(text) > LONGEST_TOKEN * context:
        raise ContextLengthExceeded(f"{_limit(context)}; the prompt has {len(text)} characters", param=param)


def _limit(context: int) -> str:
    return f"This model's maximum context length is {context} tokens"
