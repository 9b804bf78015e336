"""What each tenant has received so far, in weighted tokens: the counters that decide who is served next.

Virtual token counters: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, with the paper's weights.
"""

from __future__ import annotations

from collections import defaultdict

from server.scheduler.sequence import Sequence

# A generated token takes a step of its own, a prompt token one place in a chunk.
PROMPT_WEIGHT = 1
GENERATED_WEIGHT = 2


class Service:
    """One counter a tenant; counters only grow.

    A token is charged when it has been computed, and once: what a preemption makes the engine compute again was the
    scheduler's choice and is free. A prefix's virtual tokens are free too, for nobody computes them.
    """

    def __init__(self) -> None:
        self._received: defaultdict[str, int] = defaultdict(int)
        self._charged: dict[Sequence, int] = {}  # prompt tokens paid for, by sequence in flight

    def received(self, tenant: str) -> int:
        """Weighted tokens of a tenant, and what it was lifted by."""
        return self._received[tenant]

    def lift(self, tenant: str, level: int) -> None:
        """Raises a counter to at least `level`, so that a pause gives no credit."""
        self._received[tenant] = max(self._received[tenant], level)

    def charge(self, sequence: Sequence, *, sampled: int) -> None:
        """Counts a step of a sequence: its prompt tokens up to `computed`, and so many tokens sampled."""
        charged = self._charged.get(sequence, 0)
        computed = max(charged, sequence.read)
        self._charged[sequence] = computed
        weighted = PROMPT_WEIGHT * (computed - charged) + GENERATED_WEIGHT * sampled
        self._received[sequence.request.tenant] += weighted

    def owed(self, sequence: Sequence) -> int:
        """What a sequence will still be charged before its first token."""
        return PROMPT_WEIGHT * (sequence.source_length + sequence.prompt_length - self._charged.get(sequence, 0))

    def settle(self, sequence: Sequence) -> None:
        """Forgets a sequence that has ended; its tenant's counter stays."""
        self._charged.pop(sequence, None)

    def check_integrity(self, in_flight: list[Sequence]) -> None:
        """Raises AssertionError unless what was charged is at least what has been computed, of sequences in flight."""
        assert self._charged.keys() <= set(in_flight), "an ended sequence is still on the books"
        for sequence in in_flight:
            charged, most = self._charged.get(sequence, 0), sequence.source_length + sequence.prompt_length
            assert sequence.read <= charged <= most, f"{charged} prompt tokens charged, {sequence.read} computed"
