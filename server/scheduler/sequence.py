"""What the scheduler runs: one row's tokens, how far they are computed, and where they are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.scheduler.messages import GenerationRequest, Hypothesis, TokenLogprob
from server.scheduler.residency import Resident
from server.scheduler.slots import Extent

_MASK = 2**64 - 1


@dataclass(eq=False)
class Sequence:
    """A request in flight. `computed` of `tokens` have their keys and values in `extent`, its source's are in `source`.

    Invariant while running: `computed < len(tokens)` between steps, because the last sampled token has not been
    through the model yet. `matcher`, opaque here, is how far the answer has come in the request's grammar. Times are
    the scheduler's clock's, each of the first time.
    """

    request: GenerationRequest
    seed: int
    eos_ids: frozenset[int] = frozenset()  # the model's own ends of a text
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    extent: Extent | None = None
    source: Extent | None = None
    resident: Resident | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs_sent: bool = False
    matcher: Any = None
    arrived_at: float = 0.0
    admitted_at: float | None = None
    first_token_at: float | None = None
    _occurrences: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _counted: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)
        params = self.request.params
        self.width = params.num_beams  # rows that it takes of a step
        goes_on = params.ignore_eos and self.request.grammar is None  # where a grammar ends, nothing can come behind it
        self.end_ids = params.stop_token_ids if goes_on else params.stop_token_ids | self.eos_ids
        is_told = params.logprobs is not None or self.request.grammar is not None or self.request.last_id is not None
        self._is_bare = self.width == 1 and not (is_told or params.penalises or params.logit_bias)

    @property
    def owner(self) -> Sequence:
        """What the scheduler runs it as."""
        return self

    @property
    def prompt_length(self) -> int:
        """Tokens that the answer begins with, which the request brought."""
        return len(self.request.prompt_ids)

    @property
    def source_length(self) -> int:
        """Tokens that an encoder reads for it; 0 where the model has none."""
        return self.request.source_length

    @property
    def extents(self) -> list[Extent]:
        """The slots that it holds."""
        return [extent for extent in (self.extent, self.source) if extent is not None]

    @property
    def is_unread(self) -> bool:
        """Whether the encoder has yet to read its source, which it does whole, with the first of `tokens`."""
        return self.computed == 0 and self.source_length > 0

    @property
    def is_decoding(self) -> bool:
        """Whether one token through the model gives the next."""
        return self.remaining == 1 and not self.is_unread

    @property
    def read(self) -> int:
        """Tokens of the source and of the prompt that have been computed."""
        return min(self.computed, self.prompt_length) + (self.source_length if self.computed else 0)

    @property
    def generated(self) -> int:
        """Tokens that were sampled."""
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Tokens still to go through the model before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def final_length(self) -> int:
        """Own slots it can ever need: the last token to be sampled is never computed."""
        return self.prompt_length + max(1, self.request.params.max_tokens) - 1

    @property
    def is_mute(self) -> bool:
        """Whether the prompt is only scored: a token is sampled to end it, and nobody gets it."""
        return self.request.params.max_tokens == 0

    @property
    def forbidden(self) -> frozenset[int]:
        """Token ids that may not come next: the model's banned ones, and what would end the answer before `min_tokens`.

        Under a grammar and `ignore_eos` also the model's own at any time. Both hold only while the grammar goes on.
        """
        params, banned = self.request.params, self.request.banned_ids
        if self.generated < params.min_tokens:
            return self.end_ids | banned
        ignored = params.ignore_eos and self.request.grammar is not None
        return self.eos_ids - params.stop_token_ids | banned if ignored else banned

    @property
    def forced(self) -> int | None:
        """The one token that may come next, if it is the last and the model has a rule for that."""
        params = self.request.params
        is_last = self.generated + 1 >= params.max_tokens
        return self.request.last_id if is_last and not params.ignore_eos and self.request.grammar is None else None

    @property
    def is_adjusted(self) -> bool:
        """Whether the next token is chosen by other logits than the model's own."""
        request, params = self.request, self.request.params
        rules = self.forbidden or self.forced is not None or request.grammar is not None
        return bool(params.penalises or params.logit_bias or rules)

    @property
    def is_plain(self) -> bool:
        """Whether each of its next tokens follows from the model's logits and numbers that are known from the start.

        Then the device can choose it, and go on with it, without the host.
        """
        return self._is_bare and not self.forbidden

    def occurrences(self) -> Mapping[int, int]:
        """How often each token stands in the answer; one of the prompt alone is there, as 0, if it is penalised too.

        Counted on from the last call. A prefix's virtual tokens are no tokens and so never count.
        """
        if self._counted == 0:
            if self.request.params.repetition_penalty != 1:
                self._occurrences = dict.fromkeys(self.request.prompt_ids, 0)
            self._counted = self.prompt_length
        for token in self.tokens[self._counted :]:
            self._occurrences[token] = self._occurrences.get(token, 0) + 1
        self._counted = len(self.tokens)
        return self._occurrences

    def is_late(self, now: float) -> bool:
        """Whether it is past its deadline."""
        return self.request.deadline is not None and self.request.deadline <= now

    def forget(self) -> None:
        """Its slots are gone: the tokens are to be computed again."""
        self.computed = 0
        self.prompt_logprobs.clear()

    def given_up(self) -> tuple[Hypothesis, ...]:
        """What there is of an answer that has not been given out yet: nothing, but for beams."""
        return ()

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt positions must be scored too."""
        params = self.request.params
        return params.echo and params.logprobs is not None and not self.prompt_logprobs_sent

    def scored_prompt(self) -> tuple[TokenLogprob, ...]:
        """Every prompt token's log-probability; nothing predicts the first."""
        return TokenLogprob(self.tokens[0], None), *self.prompt_logprobs

    def uniform(self, index: int) -> float:
        """A number in [0, 1) for drawing the token of that index: a function of this and the seed only.

        So the draw is the same in any batch and after a preemption. SplitMix64 (Steele, Lea & Flood 2014).
        """
        state = (self.seed + (index - self.prompt_length + 1) * 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((state ^ (state >> 31)) >> 11) / 2**53
