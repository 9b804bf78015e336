"""How one request's tokens are chosen, named as in `/v1/completions`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from prefix_store.errors import InvalidRequest

# Below this, logits / temperature overflows float32 for ordinary logits; the limit is argmax anyway.
GREEDY_BELOW = 1e-4
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request; every field holds for its rows alone.

    `top_k` 0 and `top_p` 1 and `min_p` 0 switch a filter off. `seed` None draws one at admission. `stop` strings end
    the text before themselves. `logprobs` None gives none, n gives the chosen token and the n likeliest.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    ignore_eos: bool = False
    logprobs: int | None = None
    echo: bool = False

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 1, 1_000_000)
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise InvalidRequest("top_p must be above 0", param="top_p")
        _within("top_k", self.top_k, 0, 2**31 - 1)
        _within("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.stop) > 16 or any(not 0 < len(text) <= 256 for text in self.stop):
            raise InvalidRequest("stop must be at most 16 strings of 1 to 256 characters", param="stop")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"{name} must be from {low} to {high}, got {value}", param=name)
