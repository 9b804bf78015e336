"""How often a number fell into which range: a histogram that is cheap to count, for the thread that owns the device."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

# What a request waits for, and what a step or a copy takes.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
SHORT_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


@dataclass(frozen=True)
class Reading:
    """How many numbers were at most each of `bounds`, and behind those how many there were; and their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Distribution:
    """Counts numbers by the smallest bound that they do not exceed.

    One thread adds at a time. Who reads meanwhile may get a sum that is one number ahead or behind.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` rise."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def add(self, number: float, times: int = 1) -> None:
        """Counts a number, once or so many times."""
        self._counts[bisect_left(self._bounds, number)] += times
        self._total += number * times

    def read(self) -> Reading:
        """What was counted until now."""
        total, counts = self._total, list(self._counts)
        return Reading(self._bounds, tuple(accumulate(counts)), total)


def powers_of_two(most: int) -> tuple[int, ...]:
    """0, 1, 2, 4 and so on until `most`, for what is counted in whole numbers."""
    return (0, *(1 << power for power in range(most.bit_length())))
