"""From what a request asks of its answer's form to a grammar: tried, compiled, kept in host memory."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from prefix_store.errors import InvalidRequest
from prefix_store.model.frozen import FrozenModel
from server.engine.grammar import Grammar, GrammarError, Source, compiled, vocabulary
from server.engine.grammar_trial import Trials

LONGEST_SOURCE = 128 * 1024
BUDGET_BYTES = 256 << 20
# what its lexer may grow by while it is followed, see `grammar.LIMITS`
GROWTH_BYTES = 2 << 20
# A refusal is remembered, so that nobody can have the same trial made over and over; not for good, for a trial measures
# times, which come out differently on a busy machine.
MOST_REFUSALS, REFUSED_SECONDS = 1024, 600.0
Key = tuple[str, str]


class Grammars:
    """An LRU of compiled grammars, keyed by tenant and digest: how one is followed can spoil it for others.

    What was refused lately is refused again without a trial, whoever asks. Nothing is made before the first grammar is
    asked for: not the tokens as grammars read them, not the process for trials. `find` may be called from any thread,
    `compile` from one at a time.
    """

    def __init__(
        self, frozen: FrozenModel, budget_bytes: int = BUDGET_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._frozen = frozen
        self._budget = budget_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, tuple[Grammar, int]] = OrderedDict()
        self._refused: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._tokens: Any = None
        self._trials: Trials | None = None

    def find(self, tenant: str, source: Source, param: str) -> Grammar | None:
        """A grammar that was compiled already. Raises InvalidRequest, naming `param`, for one refused lately."""
        key = _key(tenant, source)
        with self._lock:
            until, reason = self._refused.get(key[1], (float("-inf"), ""))
            if until > self._clock():
                raise _invalid(param, reason)
            kept = self._kept.get(key)
            if kept is None or kept[0].is_spoilt:
                return None
            self._kept.move_to_end(key)
            return kept[0]

    def compile(self, tenant: str, source: Source, param: str) -> Grammar:
        """Blocks for about a second at most, longer beside a busy engine.

        Raises InvalidRequest, which names `param`, and Overloaded.
        """
        found = self.find(tenant, source, param)
        if found is not None:
            return found
        if len(source.text) > LONGEST_SOURCE:
            most = f"at most {LONGEST_SOURCE} characters"
            raise InvalidRequest(f"{param}: a grammar may have {most}, got {len(source.text)}", param=param)
        try:
            grammar, size = self._compile(source)
        except ImportError:
            missing = "needs the package llguidance, which this server lacks: pip install llguidance"
            raise InvalidRequest(f"{param} {missing}", param=param) from None
        except GrammarError as error:
            self._refuse(_key(tenant, source)[1], str(error))
            raise _invalid(param, str(error)) from None
        self._keep(_key(tenant, source), grammar, size + GROWTH_BYTES)
        return grammar

    def close(self) -> None:
        """Ends what tries grammars."""
        if self._trials is not None:
            self._trials.close()

    def _compile(self, source: Source) -> tuple[Grammar, int]:
        if self._trials is None:
            self._tokens, self._trials = self._open()
        size = self._trials.run(source)
        return Grammar(compiled(source, self._tokens), self._tokens.vocab_size), size

    def _open(self) -> tuple[Any, Trials]:
        frozen = self._frozen
        if not frozen.end_ids:
            raise GrammarError("this model has no token that ends a text")
        backend = getattr(frozen.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise GrammarError("this model's tokenizer cannot be constrained: it is not a fast one")
        size = max(frozen.vocabulary_size, backend.get_vocab_size(with_added_tokens=True))
        parts = (backend.to_str(), size, sorted(frozen.end_ids))
        return vocabulary(*parts), Trials(*parts)

    def _keep(self, key: Key, grammar: Grammar, size: int) -> None:
        with self._lock:
            self._kept[key] = grammar, size
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(size for _, size in self._kept.values()) > self._budget:
                self._kept.popitem(last=False)

    def _refuse(self, digest: str, reason: str) -> None:
        with self._lock:
            self._refused[digest] = self._clock() + REFUSED_SECONDS, reason
            self._refused.move_to_end(digest)
            if len(self._refused) > MOST_REFUSALS:
                self._refused.popitem(last=False)


def _invalid(param: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {reason}", param=param)


def _key(tenant: str, source: Source) -> Key:
    return tenant, hashlib.sha256(f"{source.kind}\0{source.text}".encode("utf-8", "surrogatepass")).hexdigest()
