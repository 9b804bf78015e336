"""What steps cost, learnt from those that ran, and so how large a chunk of prompt those who decode can bear.

A step without prompts takes some seconds for so many rows; every prompt token adds some more, and still more the
longer the text before it is. All of it differs a thousandfold between a CPU and a GPU, so nothing is set. Whatever size
of chunk is allowed is what runs and is measured next, so a wrong guess corrects itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Of the newest step in a running mean; of one without prompts that was quicker, more: what is late for once, and so
# seems to bear large chunks, is forgotten soon.
WEIGHT, QUICKER_WEIGHT = 0.1, 0.5
# After so many steps with prompts one goes without, or nothing would tell any more what that takes.
MOST_WITH_PROMPTS = 32
# What prompts may add to a step, of its time without them. Costs scatter: to keep the slowest steps below twice the
# usual ones, the aim is lower. It is raised, up to the most, where the prompts that wait would take more than so many
# steps: then steps are longer, all alike, and what has piled up is done sooner.
ADDED, ADDED_MOST, SOON = 0.5, 2.0, 7
# A step slower than so many times what was expected counts as that: something else held the machine.
OUTLIER = 4.0
# While others decode, prompts get at least so many tokens of a step.
LEAST_CHUNK = 16
# Tokens before it that make a prompt token's further cost worth learning: of much shorter texts, noise would be learnt.
FAR = 1000
# How much the costs of chunks with short texts count against a cost of long ones, which they know nothing of.
DOUBT = 0.02
# Of prompts: tokens, and how many stand before each of them on average.
Backlog = Iterable[tuple[int, float]]


@dataclass
class _Mean:
    tokens: float
    seconds: float

    def add(self, tokens: float, seconds: float) -> None:
        weight = QUICKER_WEIGHT if seconds < self.seconds else WEIGHT
        self.tokens += weight * (tokens - self.tokens)
        self.seconds += weight * (seconds - self.seconds)


class _Chunks:
    """Least squares over the newest chunks: seconds = each * tokens + further * reads, neither below zero.

    `reads` counts what attention reads for them: for each token those before it, in units of FAR.
    """

    def __init__(self) -> None:
        self._sums = [0.0] * 5

    def add(self, tokens: float, reads: float, seconds: float) -> None:
        """A chunk that took so long."""
        products = (tokens * tokens, tokens * reads, reads * reads, tokens * seconds, reads * seconds)
        self._sums = [(1 - WEIGHT) * old + new for old, new in zip(self._sums, products, strict=True)]

    def each(self, context: float) -> float | None:
        """Seconds of one token behind so many others; None if nobody can tell."""
        square, mixed, reads, alone, far = self._sums
        reads += DOUBT * square
        determinant = square * reads - mixed * mixed
        if determinant <= 0:
            return None
        each = (reads * alone - mixed * far) / determinant
        further = (square * far - mixed * alone) / determinant
        if further < 0:
            each, further = alone / square, 0.0
        cost = each + further * context / FAR
        return cost if cost > 0 else None


class StepCost:
    """Running means: of steps that only decode, one for each power of two of rows, and of what prompt tokens add."""

    def __init__(self) -> None:
        self._decoding: dict[int, _Mean] = {}
        self._chunks = _Chunks()
        self._has_begun = False
        self._with_prompts = 0  # steps since one without

    def note(self, decoding: int, prompt_tokens: int, context: float, seconds: float) -> None:
        """A step took so long with so many rows that decode and tokens of prompts, each behind so many on average."""
        if seconds <= 0:
            return  # a clock that stands still, as in tests, tells nothing
        self._with_prompts = self._with_prompts + 1 if prompt_tokens else 0
        if prompt_tokens == 0:
            mean = self._decoding.setdefault(decoding.bit_length(), _Mean(decoding, seconds))
            mean.add(decoding, min(seconds, OUTLIER * mean.seconds))
            return
        alone = self._alone(decoding)
        if alone is None or not self._has_begun:
            self._has_begun = True  # the first one pays for what is warm afterwards
            return
        added = seconds - alone
        if (each := self._chunks.each(context)) is not None:
            added = min(added, OUTLIER * each * prompt_tokens)
        self._chunks.add(prompt_tokens, prompt_tokens * context / FAR, added)

    def prompt_budget(self, step_tokens: int, decoding: int, context: float, backlog: Backlog) -> int:
        """Tokens of a step for prompts behind so many others: all there is room for, or what those who decode can bear.

        `backlog`: the prompts that are not done.
        """
        if decoding and self._with_prompts >= MOST_WITH_PROMPTS:
            return 0
        budget = step_tokens - decoding
        bearable = self.bearable(decoding, context, backlog) if decoding else None
        return budget if bearable is None else min(budget, max(LEAST_CHUNK, bearable))

    def bearable(self, decoding: int, context: float = 0.0, backlog: Backlog = ()) -> int | None:
        """Prompt tokens behind so many others that a step of so many rows can bear; None if nobody can tell."""
        alone, each = self._alone(decoding), self._chunks.each(context)
        if alone is None or each is None:
            return None
        work = sum(tokens * (self._chunks.each(behind) or 0.0) for tokens, behind in backlog)
        return int(min(ADDED_MOST, max(ADDED, work / (SOON * alone))) * alone / each)

    def _alone(self, decoding: int) -> float | None:
        """Seconds of a step that only decodes, from the mean of the most similar number of rows."""
        if not self._decoding or not decoding:
            return None
        size = min(self._decoding, key=lambda size: (abs(size - decoding.bit_length()), size))
        mean, each = self._decoding[size], self._chunks.each(0.0) or 0.0
        return max(mean.seconds / 2, mean.seconds + each * (decoding - mean.tokens))
