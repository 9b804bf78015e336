"""Token ids to text, piece by piece, and stop strings.

The text of a sequence is a function of its ids alone, so streamed pieces join to exactly what an unstreamed reply
holds. Nothing is let out that a later token could still change: an unfinished character, or the beginning of a stop
string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

from transformers import PreTrainedTokenizerFast

# What decoders put for bytes that are not, or not yet, a character.
UNFINISHED = "\ufffd"
# Tokens in which the last whole character lies, if there is one.
CONTEXT = 8
# Bytes that never become characters must not be decoded again with every later token for ever.
LONGEST_WINDOW = 64


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decodes ids without special tokens and without tidying spaces."""
    if (backend := _backend(tokenizer.__class__)) is not None:
        whole: str = backend(tokenizer).decode(list(ids), skip_special_tokens=True)
        return whole
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


@cache
def _backend(kind: type) -> Callable[[Any], Any] | None:
    """What gives the Rust tokenizer of a kind that adds nothing of its own; transformers' way to it takes longer."""
    ways = "decode", "_decode"
    is_plain = issubclass(kind, PreTrainedTokenizerFast) and all(
        getattr(kind, way) is getattr(PreTrainedTokenizerFast, way) for way in ways
    )
    return attrgetter("backend_tokenizer") if is_plain else None


class Detokenizer:
    """Decodes one sequence as it grows.

    It decodes a window: some tokens whose text is out already, then those whose text is not. The first ones are
    context: a sentencepiece tokenizer drops the space before the first token that it is shown. The window moves on
    where the text ends in a whole character, so that its first token always begins one.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = _last_text(tokenizer, prompt_ids)
        self._context = len(self._window)
        self._sent = len(decode(tokenizer, self._window))

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._window.append(token_id)
        text = decode(self._tokenizer, self._window)
        if len(self._window) > LONGEST_WINDOW:
            return self._give_up(text)
        piece = text.rstrip(UNFINISHED)[self._sent :]
        self._sent += len(piece)
        if piece and self._sent == len(text):
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._sent = len(decode(self._tokenizer, self._window))
        return piece

    def flush(self) -> str:
        """What is left once no more tokens come: bytes that never became a character."""
        text = decode(self._tokenizer, self._window)
        piece, self._sent = text[self._sent :], len(text)
        return piece

    def _give_up(self, text: str) -> str:
        """Lets all out but the last character, which alone can still be the beginning of a whole one."""
        unfinished = text.endswith(UNFINISHED)
        piece = text[self._sent : len(text) - unfinished]
        self._window = self._window[-CONTEXT:]
        self._context = CONTEXT
        self._sent = len(decode(self._tokenizer, self._window)) - unfinished
        return piece


def _last_text(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """The fewest last tokens that are whole characters; none where the text ends within one."""
    for size in range(1, min(CONTEXT, len(ids)) + 1):
        text = decode(tokenizer, ids[-size:])
        if text and not text.endswith(UNFINISHED):
            return list(ids[-size:])
    return []


class TextStream:
    """The text of one choice. `stopped` turns true when a stop string is complete; the text then ends before it.

    One that is complete within the first `min_tokens` tokens does not count.
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int] = (), stop: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._stop = tuple(stop)
        self._held = ""
        self._pushed = 0
        self._exempt = 0  # how much of what is held came with the first `min_tokens` tokens
        self._min_tokens = min_tokens
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that is certain after this token. Call no more once `stopped`."""
        self._pushed += 1
        return self._release(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The rest, when the sequence has ended by itself."""
        if self.stopped:
            return ""
        piece = self._release(self._detokenizer.flush())
        rest, self._held = self._held, ""
        return piece + rest

    def _release(self, piece: str) -> str:
        if not self._stop:
            return piece
        self._held += piece
        if self._pushed <= self._min_tokens:
            self._exempt = len(self._held)
        found = [(self._held.find(stop, max(0, self._exempt + 1 - len(stop))), len(stop)) for stop in self._stop]
        # the stop string that is complete first, and of two that end together the longer
        ends = [(start + length, start) for start, length in found if start >= 0]
        if ends:
            certain, self._held, self.stopped = self._held[: min(ends)[1]], "", True
            return certain
        keep = len(self._held) - self._beginning()
        certain, self._held = self._held[:keep], self._held[keep:]
        self._exempt = max(0, self._exempt - keep)
        return certain

    def _beginning(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        return max(
            (size for stop in self._stop for size in range(1, len(stop)) if self._held.endswith(stop[:size])), default=0
        )
