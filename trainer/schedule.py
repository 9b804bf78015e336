"""How a learning rate goes over a run: up in a line to its peak, then down towards 0."""

from __future__ import annotations

import math
from collections.abc import Callable

# the share of the peak that is left, by what is left of the way down
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
}


def share(kind: str, step: int, steps: int, warmup: float) -> float:
    """The share of the peak rate at a step, counted from 1.

    The first `warmup` of the run, a part from 0 to 1 and at least a step, leads to the peak. No step has a rate of 0.
    """
    rise = max(1, round(warmup * steps))
    left = (steps - step + 1) / (steps - rise + 1)
    return step / rise if step < rise else SCHEDULES[kind](left)
