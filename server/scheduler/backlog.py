"""Prompts that are not done, and what a step did of them, as the numbers that steps are reckoned by."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Rows

from server.scheduler.plan import Row
from server.scheduler.sequence import Sequence
from server.scheduler.step_cost import Backlog
from server.scheduler.waiting import WaitingQueue


def of(prompts: Collection[Sequence], waiting: WaitingQueue) -> Backlog:
    """Of those that have begun and of all that wait: tokens, and how many stand before each of them on average."""
    begun = [(sequence.remaining, sequence.computed + sequence.remaining / 2) for sequence in prompts]
    return [*begun, (waiting.tokens, waiting.tokens / 2 / max(1, len(waiting)))]


def context(prompts: Collection[Sequence]) -> float:
    """How many tokens stand before the next one of a prompt that has begun, on average."""
    return sum(sequence.computed for sequence in prompts) / max(1, len(prompts))


def done(rows: Rows[Row]) -> tuple[int, int, float]:
    """Of a step: rows that decoded, tokens of prompts, and how many stood before each of these on average."""
    chunks = [row for row in rows if not row.sequence.is_decoding]
    tokens = sum(row.cost for row in chunks)
    before = sum(row.cost * (row.start + row.cost / 2) for row in chunks)
    return len(rows) - len(chunks), tokens, before / max(1, tokens)
