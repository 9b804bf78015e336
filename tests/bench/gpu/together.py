"""Prefixes of many users trained together, in one pass over the model, against PEFT's one after another."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from tests.bench import results
from tests.bench.gpu import aims, machine
from tests.bench.gpu.sizes import Setup
from tests.bench.training import apart
from tests.bench.training_arms import OURS, PEFT, Arm, Ours, Peft
from tests.bench.training_arms import Setup as Given
from tests.bench.training_work import batch

# Of losses at the first step, in nats a token, both sides in half precision, which round in another order.
TOLERANCE = 0.02


def together(setup: Setup) -> Iterator[tuple[str, dict[str, Any]]]:
    """A step of every user, each with an example of his own; the first step is not timed, but its losses must agree."""
    yield aims.training(setup.size), machine.tried(setup.device, lambda: _measured(setup))


def _measured(setup: Setup) -> dict[str, Any]:
    size = setup.size
    given = Given(size.trained, size.trained_virtual_tokens, size.users, 1e-2, setup.device)
    ours = Ours(given, size.dtype)
    arms: dict[str, Arm] = {OURS: ours, PEFT: Peft(given, size.dtype)}
    batches = [
        [batch(size.trained.vocabulary, 1, size.trained_tokens, 1000 * number + user) for user in range(size.users)]
        for number in range(1 + size.training_rounds)
    ]
    control = ours.losses(batches[0], [*ours.tuned[1:], ours.tuned[0]])
    first = {name: arm.step(batches[0]) for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for found in batches[1:]:
        for name, arm in arms.items():
            seconds[name].append(machine.seconds(setup.device, lambda arm=arm, found=found: arm.step(found)))
    tokens = size.users * size.trained_tokens
    ratio = results.paired_ratio(seconds[PEFT], seconds[OURS])
    worst, other = apart([first[OURS]], [first[PEFT]]), apart([control], [first[PEFT]])
    return {
        "tokens_per_second": {name: round(tokens / statistics.median(taken), 1) for name, taken in seconds.items()},
        "ratio": round(ratio, 3),
        "losses_apart": worst,
        "with_another_prefix": other,
        "passed": worst < TOLERANCE and other > worst,
        "reached": {aims.training(size): ratio},
    }
