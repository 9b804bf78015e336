"""What a step's rows got, which the device may not have found out yet."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from prefix_store.errors import PrefixNumerics
from server.engine.batch import Selection, Unread
from server.engine.transit import Readback
from server.scheduler.plan import RowResult


class Sampled:
    """One result for each of a step's selections. `unread`: see `on_device`; None where the host knows the tokens."""

    def __init__(self, unread: Unread | None = None) -> None:
        self.unread = unread
        self._results: list[RowResult] = []
        self._told: Readback | None = None

    @classmethod
    def known(cls, results: list[RowResult]) -> Sampled:
        """Results that the host has."""
        sampled = cls()
        sampled._results = results
        return sampled

    @classmethod
    def on_device(cls, selections: Rows[Selection], tokens: torch.Tensor, finite: torch.Tensor) -> Sampled:
        """Tokens `[N]` of rows that want nothing else, each in the place of its logits; not those of rows not finite.

        They are valid ids, whatever the logits were, so that a step may go on with them before they are read.
        """
        sampled = cls(Unread(tokens, selections))
        sampled._told = Readback(tokens.where(finite, -1))
        return sampled

    def read(self) -> list[RowResult]:
        """The results, once the device has them."""
        if self._told is None or self.unread is None:
            return self._results
        told = self._told.wait().tolist()
        return [_result(told[s.last]) if s.count else RowResult() for s in self.unread.selections]


def _result(token: int) -> RowResult:
    return RowResult(token) if token >= 0 else RowResult(error=PrefixNumerics())
