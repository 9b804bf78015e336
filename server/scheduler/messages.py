"""The two records that cross the line between the API and the engine: a request down, token events up."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from prefix_store.errors import GenerationFailed
from prefix_store.geometry import Stack
from server.scheduler.sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"
    ERROR = "error"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True)
class PrefixPayload:
    """A prefix as the engine takes it: already read, checked and in host memory; immutable, keyed by digest.

    `tensor` is opaque here; for the engine it is canonical KV `[L, 2, Hkv, P, D]`; where `is_embeds`, the input
    embeddings `[P, E]` of a soft prompt, which become KV on the device; where there is a `feature_map`, a memory
    `[L, Hq, D, D]`, which has no virtual tokens and lies in `memory_slots` KV slots. `slides`: sliding-window layers
    let it slide out of sight.

    On an encoder-decoder model it has keys and values in one or more `stacks`: `tensor` is the decoder's own, `cross`
    `[L, 2, Hkv, P, D]` and `encoder` `[Le, 2, He, P, De]` are the others. A soft prompt has none there, and no slots:
    its embeddings stand in front of every request's source.
    """

    digest: str
    virtual_tokens: int
    position_offset: int
    slides: bool
    tensor: Any = field(repr=False, compare=False)
    is_embeds: bool = False
    feature_map: str | None = None
    memory_slots: int = 0
    stacks: tuple[Stack, ...] = (Stack.SELF,)
    cross: Any = field(default=None, repr=False, compare=False)
    encoder: Any = field(default=None, repr=False, compare=False)

    @property
    def slots(self) -> int:
        """KV slots that it takes on the device. The encoder's keys and values have a pool of their own, as large."""
        in_decoder = sum(stack is not Stack.ENCODER for stack in self.stacks)
        return self.virtual_tokens * max(in_decoder, Stack.ENCODER in self.stacks) + self.memory_slots

    def offset(self, stack: Stack) -> int:
        """Where among its slots a stack's keys and values begin: the decoder's two lie one behind the other."""
        return self.virtual_tokens if stack is Stack.CROSS and Stack.SELF in self.stacks else 0

    @property
    def context_tokens(self) -> int:
        """Places that it takes in the context of every request, which beside an encoder is the decoder's."""
        return self.virtual_tokens if Stack.SELF in self.stacks else self.position_offset

    @property
    def source_tokens(self) -> int:
        """Virtual tokens that are a part of each request's source."""
        return 0 if self.stacks else self.virtual_tokens


@dataclass(frozen=True)
class GenerationRequest:
    """One row's worth of work: `n` choices of a call are `n` requests. `prefix` None is the bare frozen model.

    With beams it is a row for each of them, and one request gives all choices.

    `grammar`, opaque here, is what the answer must match; None is any text.

    An encoder-decoder model's encoder reads `source_ids`; `prompt_ids` is what its answer begins with. An answer that
    `max_tokens` cuts short ends with `last_id`, where the model has such a rule, and none has a token of `banned_ids`.
    """

    id: str
    tenant: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    prefix: PrefixPayload | None = None
    deadline: float | None = None
    grammar: Any = field(default=None, repr=False, compare=False)
    source_ids: tuple[int, ...] = ()
    last_id: int | None = None
    banned_ids: frozenset[int] = frozenset()

    @property
    def source_length(self) -> int:
        """Tokens that the encoder reads: a soft prompt's, and the source's own."""
        return len(self.source_ids) + (self.prefix.source_tokens if self.prefix is not None else 0)

    @property
    def forced_length(self) -> int:
        """Tokens that an encoder-decoder model's own rules put behind the start of its answer."""
        return len(self.prompt_ids) - 1 if self.source_length else 0


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probability of a token, and the likeliest alternatives as (token id, logprob), best first."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Hypothesis:
    """An answer that beam search has found. `score`: its log-probability by its length to the power of the penalty.

    `end_logprob` as in `TokenEvent`.
    """

    token_ids: tuple[int, ...]
    score: float
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    end_logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class TokenEvent:
    """What a request's sequence produced in one step. The last event of a request has a finish reason.

    `prompt_logprobs` comes once, on the first event, when `echo` and `logprobs` were asked for; its first entry has
    no logprob. A stop token ends the sequence and is not among `token_ids`; `end_logprob` is its own, if logprobs were
    asked for. Beams give one event: `hypotheses`, best first, as many as there were beams, or fewer after a timeout.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    end_logprob: TokenLogprob | None = None
    error: GenerationFailed | None = None
    hypotheses: tuple[Hypothesis, ...] = ()
