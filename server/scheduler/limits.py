"""The sizes of an engine, and which requests fit them."""

from __future__ import annotations

from dataclasses import dataclass

from prefix_store.errors import ContextLengthExceeded, InvalidRequest
from server.scheduler.messages import GenerationRequest


@dataclass(frozen=True)
class Limits:
    """Sizes of an engine. `context_length` counts virtual, prompt and generated tokens together.

    `memory_slots`: KV slots that a prefix may take beside its place in the context. `source_slots`: those that the
    request of an encoder-decoder model may take beside it, for its source and for a prefix's cross-attention.
    """

    slots: int
    rows: int
    step_tokens: int
    context_length: int
    waiting: int
    memory_slots: int = 0
    source_slots: int = 0

    @property
    def most_rows(self) -> int:
        """Rows of a step: each takes at least a token of it."""
        return min(self.rows, self.step_tokens)

    @property
    def preloadable(self) -> int:
        """Slots for prefixes that stay without a reader: half of what the longest request leaves."""
        return max(0, self.slots - self.context_length - self.memory_slots - self.source_slots) // 2


def check_fits(request: GenerationRequest, limits: Limits) -> None:
    """Raises ContextLengthExceeded or InvalidRequest for a request that could never run."""
    prefix = request.prefix
    virtual, slots = (prefix.context_tokens, prefix.slots) if prefix is not None else (0, 0)
    prompt, new, source = len(request.prompt_ids), request.params.max_tokens, request.source_length
    beams = request.params.num_beams
    if source > limits.context_length:
        raise ContextLengthExceeded(
            f"This model's encoder reads at most {limits.context_length} tokens; the request has {source}, "
            f"{source - len(request.source_ids)} of them the prefix's",
            param="prompt",
        )
    if not request.prompt_ids:
        raise InvalidRequest("the prompt is empty: at least one token is needed", param="prompt")
    if virtual + prompt + new > limits.context_length:
        begun = "that every answer begins with" if request.source_ids else "of the prompt"
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limits.context_length} tokens; the request needs "
            f"{virtual + prompt + new}: {virtual} of the prefix, {prompt} {begun} and {new} of max_tokens",
            param="max_tokens",
        )
    if (needed := slots + source + prompt + new) > limits.slots:
        raise InvalidRequest(f"the request needs {needed} KV slots, this server has {limits.slots}", param="max_tokens")
    if beams > 1:
        _check_beams(slots + source, beams, prompt + new, limits)


def _check_beams(shared: int, beams: int, length: int, limits: Limits) -> None:
    if beams > limits.most_rows:
        raise InvalidRequest(
            f"num_beams must be at most {limits.most_rows} on this server, got {beams}", param="num_beams"
        )
    # what is preloaded stays; one row that fits the context always fits beside it, several may not
    room = limits.slots - limits.preloadable
    needed = shared + beams * length
    if needed > room:
        raise InvalidRequest(
            f"{beams} beams of {length} tokens need {needed} KV slots, this server has {room} for them",
            param="num_beams",
        )
