"""What completions and chat completions have in common: the envelope of a reply, its usage, the chunks of a stream."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from server.api.generation import Generation
from server.api.openai_schemas import AnswerBody
from server.scheduler.messages import FinishReason

Choices = AsyncGenerator[dict[str, Any], None]


@dataclass(frozen=True)
class Reply:
    """The reply to one call, or the stream of its chunks. `head` is what each of them begins with."""

    generation: Generation
    body: AnswerBody
    head: dict[str, Any]

    @classmethod
    def to(cls, body: AnswerBody, generation: Generation, kind: str) -> Reply:
        """The reply to a body; `kind` is OpenAI's name for this kind of object."""
        prefix = generation.prefix
        head = {
            "id": generation.id,
            "object": kind,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": fingerprint(
                generation.services.frozen.digest, prefix.version.digest if prefix else None
            ),
            "prefix": prefix.to_json() if prefix else None,
        }
        return cls(generation, body, head)

    def whole(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The reply that is not streamed."""
        return {**self.head, "choices": list(choices), "usage": self.usage()}

    async def chunks(self, choices: Choices) -> AsyncGenerator[dict[str, Any], None]:
        """The stream's chunks, one for each of `choices`, and one of usage alone if that was asked for."""
        options = self.body.stream_options
        async with aclosing(choices):
            async for choice in choices:
                yield {**self.head, "choices": [choice], **self._running_usage()}
        if options.include_usage:
            yield {**self.head, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens so far. A prefix's are beside the prompt's, and in no sum."""
        prompt, completion = self.generation.prompt_tokens, self.generation.call.tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "virtual_tokens": self.generation.virtual_tokens,
        }

    def _running_usage(self) -> dict[str, Any]:
        """What a chunk with a choice says of usage: nothing unless asked; null where only the last chunk tells."""
        options = self.body.stream_options
        if options.continuous_usage_stats:
            return {"usage": self.usage()}
        return {"usage": None} if options.include_usage else {}


def ending(reason: str | None) -> dict[str, str | None]:
    """Why a choice ended, in OpenAI's words, for strict clients know no others: what time cut short is cut."""
    if reason == FinishReason.TIMEOUT:
        return {"finish_reason": FinishReason.LENGTH, "stop_reason": FinishReason.TIMEOUT}
    return {"finish_reason": reason}


def fingerprint(base_digest: str, prefix_digest: str | None) -> str:
    """Equal for equal weights: those of the base model and of the prefix, or of the base model alone."""
    both = f"{base_digest}\0{prefix_digest or ''}".encode()
    return f"fp_{hashlib.sha256(both).hexdigest()[:16]}"
