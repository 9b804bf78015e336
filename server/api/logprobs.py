"""Log-probabilities as `/generate` and OpenAI's completions show them: four parallel lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.scheduler.messages import TokenLogprob
from server.text import UNFINISHED, decode

# JSON has no -Infinity; OpenAI's own floor
LOWEST = -9999.0


def render(entries: Sequence[TokenLogprob], tokenizer: Any) -> dict[str, list[Any]]:
    """`{tokens, token_ids, token_logprobs, top_logprobs}`.

    Each of `top_logprobs` maps token texts to logprobs and holds the token itself too; it is null, as the logprob is,
    for the first token of an echoed prompt.
    """
    return {
        "tokens": [_text(entry.token_id, tokenizer) for entry in entries],
        "token_ids": [entry.token_id for entry in entries],
        "token_logprobs": [_floor(entry.logprob) for entry in entries],
        "top_logprobs": [_top(entry, tokenizer) for entry in entries],
    }


def _top(entry: TokenLogprob, tokenizer: Any) -> dict[str, float | None] | None:
    if entry.logprob is None:
        return None
    best = {**dict(entry.top), entry.token_id: entry.logprob}
    top: dict[str, float | None] = {}
    for token_id, logprob in best.items():
        text = _text(token_id, tokenizer)
        # two tokens may read the same
        top[f"token_id:{token_id}" if text in top else text] = _floor(logprob)
    return top


def _text(token_id: int, tokenizer: Any) -> str:
    """The token's own text; its id where that is only a part of a character, or nothing, and so names no token."""
    text = decode(tokenizer, [token_id])
    return text if text and UNFINISHED not in text else f"token_id:{token_id}"


def _floor(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST)
