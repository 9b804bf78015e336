"""What the loop counts of every step, in one pass over its rows: it runs on the thread that owns the device."""

from __future__ import annotations

from server.distribution import SHORT_SECONDS, Distribution, powers_of_two
from server.scheduler.plan import StepPlan

MOST_ROWS, MOST_TOKENS = 1 << 12, 1 << 14


class StepMeter:
    """Counters that only grow, and `distinct_prefixes`, which is of the last step. Not thread-safe.

    `gaps` are from one token of a sequence to its next: a row that decodes has its last token from the step before, so
    they are the same for all of a step. The one gap in which a sequence was preempted is not among them.
    """

    def __init__(self) -> None:
        self.steps = self.prompt_tokens = self.generated_tokens = self.distinct_prefixes = 0
        self.seconds, self.gaps = Distribution(SHORT_SECONDS), Distribution(SHORT_SECONDS)
        self.rows, self.prefixes = (Distribution(powers_of_two(MOST_ROWS)) for _ in range(2))
        self.tokens = Distribution(powers_of_two(MOST_TOKENS))
        self._ended_at = 0.0

    def count(self, plan: StepPlan, begun: float, now: float) -> None:
        """Counts a step that was begun at one time and done by another, and whose tokens are not applied yet."""
        if not plan.rows:
            return  # nothing but what was to be brought or moved
        prefixes = set()
        tokens = prompt_tokens = generated = decoding = 0
        for row in plan.rows:
            sequence = row.sequence
            request = sequence.request
            if request.prefix is not None:
                prefixes.add(request.prefix.digest)
            if row.start < len(request.prompt_ids):
                tokens += (cost := row.cost)
                prompt_tokens += cost
            else:
                tokens += row.count
                decoding += row.count == 1
            # as `samples` and `is_mute` say it, without the price of asking them for every row of every step
            if row.start + row.count == len(sequence.tokens) and request.params.max_tokens:
                generated += 1
        self.steps += 1
        self.prompt_tokens += prompt_tokens
        self.generated_tokens += generated
        self.distinct_prefixes = len(prefixes)
        self.rows.add(len(plan.rows))
        self.prefixes.add(len(prefixes))
        self.tokens.add(tokens)
        self.seconds.add(now - max(begun, self._ended_at))  # it may have been launched behind another
        if decoding:
            self.gaps.add(now - self._ended_at, decoding)
        self._ended_at = now
