"""How many tokens go through the model at a time: a whole step, until there is no memory for that.

Taking slots from somebody would not help: the KV pool is there from the start, whoever has slots in it. What a step
takes besides goes with its tokens, so fewer at a time take less. Rows know nothing of one another, so a step in pieces
gives what it would have given whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from server.scheduler.plan import Row

# Once so many pieces ran, twice the tokens are tried again: what is short is mostly somebody else's for a while. Where
# it is for good, one of so many pieces is computed in vain.
PATIENCE = 64


class Room:
    """`tokens` of a piece: never more than `most`, which no step is larger than."""

    def __init__(self, most: int) -> None:
        self.tokens = self._most = most
        self._fitted = 0

    def take(self, rows: deque[Row]) -> list[Row]:
        """The next piece off the front of a step's rows: one at least, and of one alone no more tokens than there may
        be, as far as it can be cut. A source is read whole.
        """
        first = rows.popleft()
        left = self.tokens - first.cost
        piece = [first if left >= 0 else replace(first, count=max(1, first.count + left))]
        while rows and rows[0].cost <= left:
            left -= rows[0].cost
            piece.append(rows.popleft())
        return piece

    def note_fit(self) -> None:
        """A piece ran."""
        self._fitted += 1
        if self._fitted >= PATIENCE:
            self.tokens, self._fitted = min(self._most, 2 * self.tokens), 0

    def note_shortage(self, piece: Iterable[Row]) -> None:
        """There was no memory for a piece: from now on at most half as much."""
        self.tokens, self._fitted = max(1, sum(row.cost for row in piece) // 2), 0
