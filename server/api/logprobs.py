"""Log-probabilities: four parallel lists, as `/generate` and OpenAI's completions show them, and as its chat does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.scheduler.messages import TokenLogprob
from server.text import UNFINISHED, Detokenizer, decode

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


class Offsets:
    """Where in a text each of its tokens begins, in characters; `before` are the tokens that the text follows.

    A token that only goes on with a character begins where that does.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer, before)
        self._at = 0

    def of(self, entries: Sequence[TokenLogprob]) -> list[int]:
        """The offsets of the tokens that come next."""
        found = []
        for entry in entries:
            found.append(self._at)
            self._at += len(self._detokenizer.push(entry.token_id))
        return found


def of_chat(entries: Sequence[TokenLogprob], tokenizer: Any) -> dict[str, Any]:
    """`{content: [{token, logprob, bytes, top_logprobs}], refusal}`. `bytes` is null for a part of a character."""
    content = [
        {
            **_token(entry.token_id, entry.logprob, tokenizer),
            "top_logprobs": [_token(token_id, logprob, tokenizer) for token_id, logprob in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _token(token_id: int, logprob: float | None, tokenizer: Any) -> dict[str, Any]:
    text = _text(token_id, tokenizer)
    own = text != _nameless(token_id)
    return {"token": text, "logprob": _floor(logprob), "bytes": list(text.encode()) if own else None}


def _top(entry: TokenLogprob, tokenizer: Any) -> dict[str, float | None] | None:
    if entry.logprob is None:
        return None
    best = {**dict(entry.top), entry.token_id: entry.logprob}
    top: dict[str, float | None] = {}
    for token_id, logprob in best.items():
        text = _text(token_id, tokenizer)
        # two tokens may read the same
        top[_nameless(token_id) if text in top else text] = _floor(logprob)
    return top


def _text(token_id: int, tokenizer: Any) -> str:
    """The token's own text; its id where that is only a part of a character, or nothing, and so names no token."""
    text = decode(tokenizer, [token_id])
    return text if text and UNFINISHED not in text else _nameless(token_id)


def _nameless(token_id: int) -> str:
    return f"token_id:{token_id}"


def _floor(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST)
