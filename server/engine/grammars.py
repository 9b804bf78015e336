"""From what a request asks of its answer's form to a grammar: tried, compiled, kept in host memory."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Any

from prefix_store.errors import InvalidRequest
from prefix_store.model.frozen import FrozenModel
from server.engine.grammar import Grammar, GrammarError, Source, compiled, vocabulary
from server.engine.grammar_trial import Trials

LONGEST_SOURCE = 128 * 1024
BUDGET_BYTES = 256 << 20
# what its lexer may grow by while it is followed, see `grammar.LIMITS`
GROWTH_BYTES = 2 << 20
Key = tuple[str, str]


class Grammars:
    """An LRU of compiled grammars, keyed by tenant and digest: how one is followed can spoil it for others.

    Nothing is made before the first grammar is asked for: not the tokens as grammars read them, not the process for
    trials. `find` may be called from any thread, `compile` from one at a time.
    """

    def __init__(self, frozen: FrozenModel, budget_bytes: int = BUDGET_BYTES) -> None:
        self._frozen = frozen
        self._budget = budget_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, tuple[Grammar, int]] = OrderedDict()
        self._tokens: Any = None
        self._trials: Trials | None = None

    def find(self, tenant: str, source: Source) -> Grammar | None:
        """A grammar that was compiled already."""
        with self._lock:
            kept = self._kept.get(key := _key(tenant, source))
            if kept is None or kept[0].is_spoilt:
                return None
            self._kept.move_to_end(key)
            return kept[0]

    def compile(self, tenant: str, source: Source, param: str) -> Grammar:
        """Blocks for about a second at most, longer beside a busy engine.

        Raises InvalidRequest, which names `param`, and Overloaded.
        """
        found = self.find(tenant, source)
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
            raise InvalidRequest(f"{param}: {error}", param=param) from None
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


def _key(tenant: str, source: Source) -> Key:
    return tenant, hashlib.sha256(f"{source.kind}\0{source.text}".encode("utf-8", "surrogatepass")).hexdigest()
