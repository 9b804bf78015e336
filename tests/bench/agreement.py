"""Whether two contestants say the same. No timing counts before they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from server.engine.engine import Engine
from server.scheduler.messages import PrefixPayload
from tests.bench.drive import Tokens, drain
from tests.bench.workload import Item, Workload
from tests.parity.harness import Recorder

# Two float32 sums in another order may swap tokens this close; farther apart, a difference is an error.
TIE = 1e-4
# Half precision rounds every layer, and in another order: largest difference over largest logit.
BFLOAT16_TOLERANCE = 0.1

NextLogits = Callable[[Item, Sequence[int]], torch.Tensor]


def same_tokens(ours: Tokens, theirs: Tokens, requests: Sequence[Item], next_logits: NextLogits) -> int:
    """How many requests differ, each only after a tie of the two best logits. Raises AssertionError on any other.

    `next_logits` `[V]` are of the token after a request's prompt and what the reference has generated so far.
    """
    ties = 0
    for mine, reference, item in zip(ours, theirs, requests, strict=True):
        if mine == reference:
            continue
        first = next(i for i, pair in enumerate(zip(mine, reference, strict=True)) if pair[0] != pair[1])
        best = torch.topk(next_logits(item, reference[:first]), 2).values
        assert float(best[0] - best[1]) < TIE, f"token {first} differs from the reference's and is no tie"
        ties += 1
    return ties


@dataclass(frozen=True)
class Closeness:
    """Largest logit difference over largest logit: between the same requests, and as a control between neighbours'."""

    worst: float
    control: float

    def check(self) -> None:
        """Raises AssertionError unless the same are within tolerance, and nearer than what is not the same."""
        assert self.worst <= BFLOAT16_TOLERANCE, f"logits differ by {self.worst:.2e} of the largest"
        assert self.worst < self.control, "another prefix would have passed for the right one"


def closeness(
    engine: Engine, workload: Workload, items: Sequence[Item], payloads: Sequence[PrefixPayload], peer: NextLogits
) -> Closeness:
    """Compares the logits after each prompt, all requests in one batch, with a peer's, each alone."""
    ours = first_logits(engine, workload, items, payloads)
    theirs = [peer(item, ()) for item in items]
    others = [peer(replace(item, prefix=(item.prefix + 1) % workload.prefixes), ()) for item in items]
    return Closeness(max(map(_difference, ours, theirs)), min(map(_difference, ours, others)))


def first_logits(
    engine: Engine, workload: Workload, items: Sequence[Item], payloads: Sequence[PrefixPayload]
) -> list[torch.Tensor]:
    """The engine's logits `[V]` of the token after each prompt."""
    runner, recorder = engine.runner, Recorder(engine.runner)
    engine.runner = recorder  # type: ignore[assignment]
    try:
        drain(engine, replace(workload, new_tokens=1).requests_for(items, payloads))
    finally:
        engine.runner = runner
    return [recorder.recorded[str(index)][0] for index in range(len(items))]


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
