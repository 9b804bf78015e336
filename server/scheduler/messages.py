"""The two records that cross the line between the API and the engine: a request down, token events up."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from server.scheduler.sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True)
class PrefixPayload:
    """A prefix as the engine takes it: already read, checked and in host memory; immutable, keyed by digest.

    `tensor` is opaque here; for the engine it is canonical KV `[L, 2, Hkv, P, D]`; where `is_embeds`, the input
    embeddings `[P, E]` of a soft prompt, which become KV on the device; where there is a `feature_map`, a memory
    `[L, Hq, D, D]`, which has no virtual tokens and lies in `memory_slots` KV slots. `slides`: sliding-window layers
    let it slide out of sight.
    """

    digest: str
    virtual_tokens: int
    position_offset: int
    slides: bool
    tensor: Any = field(repr=False, compare=False)
    is_embeds: bool = False
    feature_map: str | None = None
    memory_slots: int = 0

    @property
    def slots(self) -> int:
        """KV slots that it takes on the device."""
        return self.virtual_tokens + self.memory_slots


@dataclass(frozen=True)
class GenerationRequest:
    """One row's worth of work: `n` choices of a call are `n` requests. `prefix` None is the bare frozen model.

    With beams it is a row for each of them, and one request gives all choices.

    `grammar`, opaque here, is what the answer must match; None is any text.
    """

    id: str
    tenant: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    prefix: PrefixPayload | None = None
    deadline: float | None = None
    grammar: Any = field(default=None, repr=False, compare=False)


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
    error: str | None = None
    hypotheses: tuple[Hypothesis, ...] = ()
