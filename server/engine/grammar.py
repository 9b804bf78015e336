"""What structured output may be: a grammar over bytes, and how far a sequence's answer has come in it.

llguidance does the work. It is imported when the first grammar is compiled, and the engine runs without it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

# Between the parts of a JSON text: nothing, a blank, or a new line and its indentation. Without an end to it, a model
# that likes blanks would write nothing else.
WHITESPACE: Any = {"whitespace_pattern": r" |\n {0,20}"}
# What one step may cost, about 5 ms at the most, and how much memory a grammar may gather: each state of its lexer is
# 1 to 2 kB.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
LONGEST_REASON = 300
OPTIONS = "x-guidance"
OVERLAP = (
    "oneOf: one answer might be of two of its alternatives; use anyOf, or tell them apart by a required property with "
    "a different const in each"
)


class Kind(StrEnum):
    """What a grammar's text is: a JSON schema, a regular expression, a JSON list of texts, or Lark or GBNF."""

    JSON = "json"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True)
class Source:
    """A grammar as it was asked for."""

    kind: Kind
    text: str


class GrammarError(ValueError):
    """A grammar that cannot be followed; the message says why."""


class Matcher:
    """How far one answer has come. Of one thread."""

    def __init__(self, start: Any, tokens: int) -> None:
        self._state = start.deep_copy()
        self._read = 0
        self._bits = np.zeros(-(-tokens // 32), np.uint32)

    def read(self, answer: list[int]) -> None:
        """Reads on in an answer that has grown, and finds what may come next. Raises GrammarError."""
        if answer[self._read :]:
            self._state.consume_tokens(answer[self._read :])
            self._read = len(answer)
        self._bits[:] = 0
        self._state.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        check(self._state)

    def allowed(self, vocabulary: int, ends: Collection[int] = ()) -> np.ndarray:
        """Whether each token may come next, `[V]` booleans; those of `ends` may where the answer may end.

        The model's own end-of-text tokens need not be among them.
        """
        found = np.zeros(vocabulary, bool)
        known = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[:vocabulary]
        found[: len(known)] = known
        if ends and self._state.is_accepting():
            found[[token for token in ends if 0 <= token < vocabulary]] = True
        return found


@dataclass(eq=False)
class Grammar:
    """A compiled grammar over so many tokens. `start` is never moved on; what its copies find out is kept for all."""

    start: Any = field(repr=False)
    tokens: int
    # once its copies have found out more than they may, each of them fails at once
    is_spoilt: bool = False

    def matcher(self) -> Matcher:
        """One for a new answer."""
        return Matcher(self.start, self.tokens)


def vocabulary(tokenizer_json: str, size: int, end_ids: list[int]) -> Any:
    """The tokens as llguidance reads them. Raises GrammarError for a tokenizer that it cannot read."""
    from llguidance import LLTokenizer

    try:
        return LLTokenizer(tokenizer_json, n_vocab=size, eos_token=end_ids)
    except ValueError as error:
        raise GrammarError(f"this model's tokenizer cannot be constrained: {_line(str(error))}") from None


def compiled(source: Source, tokens: Any) -> Any:
    """A state at the beginning of a grammar, over what `vocabulary` gave. Raises GrammarError."""
    from llguidance import LLMatcher, LLParserLimits, grammar_from, regex_to_lark

    try:
        if source.kind is Kind.JSON:
            text = LLMatcher.grammar_from_json_schema(_plain(source.text), WHITESPACE)
        elif source.kind is Kind.REGEX:
            # else \d would be any of Unicode's digits, which nobody means
            text = LLMatcher.grammar_from_regex(regex_to_lark(source.text, "d"))
        else:
            kind: Any = source.kind.value
            text = grammar_from(kind, source.text)
    except ValueError as error:
        raise GrammarError(_line(str(error))) from None
    state = LLMatcher(tokens, text, log_level=0, limits=LLParserLimits(**LIMITS))
    check(state)
    return state


def check(state: Any) -> None:
    """Raises GrammarError for a state that cannot go on."""
    if state.is_error():
        reason = state.get_error()
        raise GrammarError("no text can match it" if reason.startswith("NoExtension") else _line(reason))


def _plain(schema: str) -> str:
    """A schema without llguidance's own options: to JSON Schema they are an unknown keyword, which asks for nothing."""
    found = None
    with suppress(ValueError, RecursionError):  # what is wrong with it is llguidance's to say
        found = json.loads(schema)
    if not isinstance(found, dict) or OPTIONS not in found:
        return schema
    return json.dumps({name: part for name, part in found.items() if name != OPTIONS})


def _line(text: str) -> str:
    """The line of a message that says what is wrong; the others repeat what came."""
    if text.startswith("oneOf constraints are not supported"):
        return OVERLAP
    lines = [line.strip() for line in text.splitlines()] or [""]
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    return line.removeprefix("error: ")[:LONGEST_REASON]
