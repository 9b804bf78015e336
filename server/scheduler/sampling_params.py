"""How one request's tokens are chosen, named as in `/v1/completions`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from prefix_store.errors import InvalidRequest

# Below this, logits / temperature overflows float32 for ordinary logits; the limit is argmax anyway.
GREEDY_BELOW = 1e-4
MAX_TOKENS = 1_000_000
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BEAMS = 64
INT64 = -(2**63), 2**63 - 1
# Both ends may be had, but for a `top_p` of 0.
RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (0, MAX_TOKENS),
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    # vLLM takes any above 0; within these float32 neither overflows nor loses the penalty
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "num_beams": (1, MAX_BEAMS),
    "length_penalty": (-10.0, 10.0),
}


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request; every field holds for its rows alone.

    `top_k` 0 and `top_p` 1 and `min_p` 0 switch a filter off. `repetition_penalty` (Keskar et al. 2019) divides the
    positive and multiplies the negative logits of tokens in the prompt or the answer; from those in the answer,
    `presence_penalty` is subtracted once and `frequency_penalty` as often as they stand there. `logit_bias` holds pairs
    of a token id and what is added to its logit. `seed` None draws one at admission. `stop` strings end the text before
    themselves. None of `stop_token_ids` is drawn before `min_tokens` others. `logprobs` None gives none, n gives the
    chosen token and the n likeliest, all by the model's own logits. With `echo` alone `max_tokens` may be 0: the prompt
    is scored and nothing is said.

    `num_beams` above 1 searches for the likeliest answers instead of drawing one (`beams`): an answer's score is the
    sum of its log-probabilities by its length to the power of `length_penalty`, and the search ends by
    `early_stopping`: True once there are as many answers as beams, False once none seems to become better, "never" once
    none can.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    echo: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.max_tokens == 0 and not self.echo:
            but = "0 is for routes that echo: with `echo` true the prompt is scored and nothing is said"
            raise InvalidRequest(f"max_tokens must be from 1 to {MAX_TOKENS}, got 0; {but}", param="max_tokens")
        for name, ends in RANGES.items():
            _within(name, getattr(self, name), *ends)
        if not 0 <= self.min_tokens <= self.max_tokens:
            expected = f"from 0 to max_tokens, which is {self.max_tokens}"
            raise InvalidRequest(f"min_tokens must be {expected}, got {self.min_tokens}", param="min_tokens")
        if self.top_p == 0:
            raise InvalidRequest("top_p must be above 0", param="top_p")
        self._check_logit_bias()
        if self.seed is not None:
            _within("seed", self.seed, *INT64)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.stop) > 16 or any(not 0 < len(text) <= 256 for text in self.stop):
            raise InvalidRequest("stop must be at most 16 strings of 1 to 256 characters", param="stop")
        for token_id in self.stop_token_ids:
            _within("stop_token_ids", token_id, *INT64)
        self._check_beams()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalises(self) -> bool:
        """Whether earlier tokens change the logits of later ones."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def _check_beams(self) -> None:
        if self.num_beams == 1:
            if (self.length_penalty, self.early_stopping) != (1.0, False):
                name = "length_penalty" if self.length_penalty != 1 else "early_stopping"
                raise InvalidRequest(f"{name} needs num_beams to be above 1", param=name)
            return
        if self.temperature != 1 and not self.is_greedy:
            expected = "temperature must be 0 or 1 with num_beams, for nothing is drawn"
            raise InvalidRequest(f"{expected}; got {self.temperature}", param="temperature")
        for name, neutral in (("top_p", 1), ("top_k", 0), ("min_p", 0), ("stop", ())):
            if getattr(self, name) != neutral:
                raise InvalidRequest(f"{name} cannot go together with num_beams", param=name)
        if self.max_tokens == 0:
            raise InvalidRequest("max_tokens must be at least 1 with num_beams, got 0", param="max_tokens")

    def _check_logit_bias(self) -> None:
        if len(self.logit_bias) > MAX_BIASES:
            expected = f"at most {MAX_BIASES} token ids"
            raise InvalidRequest(f"logit_bias must be {expected}, got {len(self.logit_bias)}", param="logit_bias")
        for token_id, bias in self.logit_bias:
            if not 0 <= token_id <= INT64[1]:
                expected = f"from 0 to {INT64[1]}"
                raise InvalidRequest(f"logit_bias: token ids must be {expected}, got {token_id}", param="logit_bias")
            _within("logit_bias", bias, -100.0, 100.0)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"{name} must be from {low} to {high}, got {value}", param=name)
