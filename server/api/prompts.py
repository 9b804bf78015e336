"""What the model reads after the prefix, as ids and as text."""

from __future__ import annotations

from dataclasses import dataclass

from anyio import to_thread

from prefix_store.errors import ContextLengthExceeded, InvalidRequest
from prefix_store.model.prompt import encode, render
from server.api.services import Services
from server.text import decode

# No tokenizer in use has longer tokens than this, in characters; the longest are runs of blanks.
LONGEST_TOKEN = 256


@dataclass(frozen=True)
class Prompt:
    """`text` is what an echo shows: as it was given, in its template, or decoded from the ids that were given."""

    ids: tuple[int, ...]
    text: str


async def from_text(text: str, template: str | None, services: Services) -> Prompt:
    """Encodes a text in a thread, for a long one takes a while. One that could never fit is not even encoded."""
    whole = render(text, template)
    context = services.frozen.context_length
    if len(whole) > LONGEST_TOKEN * context:
        raise ContextLengthExceeded(f"{_limit(context)}; the prompt has {len(whole)} characters", param="prompt")
    ids = await to_thread.run_sync(encode, services.frozen.tokenizer, whole, limiter=services.tokenizing)
    return Prompt(tuple(ids), whole)


def from_ids(ids: list[int], services: Services) -> Prompt:
    """Takes ids as they are; none at all become BOS. Raises InvalidRequest for an id the model does not have."""
    context = services.frozen.context_length
    if len(ids) > context:
        raise ContextLengthExceeded(f"{_limit(context)}; the prompt alone has {len(ids)}", param="prompt")
    ids = ids or encode(services.frozen.tokenizer, "")
    if min(ids) < 0 or max(ids) >= services.frozen.vocabulary_size:
        odd, last = min(ids) if min(ids) < 0 else max(ids), services.frozen.vocabulary_size - 1
        raise InvalidRequest(f"prompt: token ids must be from 0 to {last}, got {odd}", param="prompt")
    return Prompt(tuple(ids), decode(services.frozen.tokenizer, ids))


def _limit(context: int) -> str:
    return f"This model's maximum context length is {context} tokens"
