"""Whose name stands in a label: the busiest tenants have one of their own, all others are `other`.

So a scrape holds a bounded number of names, whoever calls. The names change slowly, or what scrapes would remember
ever more of them; and each number only grows under its name, as a counter's must.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping

MOST = 50
OTHER = "other"  # a tenant that is called so has no name of its own
# So often names may change hands. What was done before counts half, and who gets a name must have done more than so
# many times as much as who loses it: with less, those who do about the same would take it from one another.
PERIOD_SECONDS, TIMES = 600.0, 4


class Busiest:
    """Tokens by tenant and kind. Safe to call from any thread.

    A name that is free goes to whoever comes first. Once there is none, it is looked at now and then who did more by
    far than somebody who has one; who gets a name begins at nothing, for what it did before stands under `other`.
    """

    def __init__(self, kinds: tuple[str, ...], most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self._kinds, self._most, self._clock = kinds, most, clock
        self._lock = threading.Lock()
        self._named: dict[str, dict[str, int]] = {OTHER: dict.fromkeys(kinds, 0)}
        self._recent: Counter[str] = Counter()  # tokens of this period, half of those before, and so on
        self._until = clock() + PERIOD_SECONDS

    def count(self, tenant: str, kind: str, tokens: int) -> None:
        """Counts what a tenant was given, under its name or `other`."""
        with self._lock:
            if self._clock() >= self._until:
                self._choose_anew()
            if tenant not in self._named and len(self._named) <= self._most:
                self._named[tenant] = dict.fromkeys(self._kinds, 0)
            self._recent[tenant] += tokens
            self._named[tenant if tenant in self._named else OTHER][kind] += tokens

    def totals(self) -> dict[str, dict[str, int]]:
        """By name: how many tokens of each kind since it was given."""
        with self._lock:
            return {name: dict(tokens) for name, tokens in self._named.items()}

    def fold(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """Numbers by tenant as numbers by name; 0 for a name whose tenant has none."""
        with self._lock:
            folded = dict.fromkeys(self._named, 0)
            for tenant, number in numbers.items():
                folded[tenant if tenant in folded else OTHER] += number
            return folded

    def _choose_anew(self) -> None:
        self._recent.pop(OTHER, None)
        named = sorted(self._named.keys() - {OTHER}, key=self._recent.__getitem__)
        waiting = [tenant for tenant, _ in self._recent.most_common(self._most) if tenant not in self._named]
        for newcomer, least in zip(waiting, named, strict=False):
            if self._recent[newcomer] <= TIMES * self._recent[least]:
                break
            del self._named[least]
            self._named[newcomer] = dict.fromkeys(self._kinds, 0)
        self._recent = Counter({tenant: left for tenant, tokens in self._recent.items() if (left := tokens // 2)})
        self._until = self._clock() + PERIOD_SECONDS
