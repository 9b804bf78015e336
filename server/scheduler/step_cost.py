"""What steps cost, learnt from those that ran, and so how large a chunk of prompt those who decode can bear.

A step without prompts takes some seconds for so many rows; every prompt token adds some more. Both differ a
thousandfold between a CPU and a GPU, so neither is set. Whatever size of chunk is allowed is what runs and is measured
next, so a wrong guess corrects itself.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of the newest step in a running mean.
WEIGHT = 0.1
# What prompts may add to a step, of its time without them. Costs scatter, and growing contexts make them lag behind: to
# keep the slowest steps below twice the usual ones, the aim is lower.
ADDED = 0.7
# A step slower than so many times what was expected counts as that: something else held the machine.
OUTLIER = 4.0
# While others decode, prompts get at least so many tokens of a step, and so many for each of them: where many have
# piled up, all in all they are done sooner by long steps than by short ones.
LEAST_CHUNK, CHUNK_EACH = 16, 8


@dataclass
class _Mean:
    tokens: float
    seconds: float

    def add(self, tokens: float, seconds: float) -> None:
        self.tokens += WEIGHT * (tokens - self.tokens)
        self.seconds += WEIGHT * (seconds - self.seconds)


class StepCost:
    """Running means: of steps that only decode, one for each power of two of rows, and of what prompt tokens add."""

    def __init__(self) -> None:
        self._decoding: dict[int, _Mean] = {}
        self._added: _Mean | None = None
        self._has_begun = False

    def note(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """A step with so many rows that decode, and so many tokens of prompts, took so long."""
        if seconds <= 0:
            return  # a clock that stands still, as in tests, tells nothing
        if prompt_tokens == 0:
            mean = self._decoding.setdefault(decoding.bit_length(), _Mean(decoding, seconds))
            mean.add(decoding, min(seconds, OUTLIER * mean.seconds))
            return
        alone = self._alone(decoding)
        if alone is None or not self._has_begun:
            self._has_begun = True  # the first one pays for what is warm afterwards
            return
        added = seconds - alone
        if self._added is None:
            self._added = _Mean(prompt_tokens, added)
        elif (each := self._each()) is not None:
            added = min(added, OUTLIER * each * prompt_tokens)
        self._added.add(prompt_tokens, added)

    def prompt_budget(self, step_tokens: int, decoding: int, prompts: int) -> int:
        """Tokens of a step for prompts: all that there is room for, or as few as those who decode can bear."""
        budget = step_tokens - decoding
        bearable = self.bearable(decoding) if decoding else None
        if bearable is None:
            return budget
        return min(budget, max(LEAST_CHUNK, bearable, CHUNK_EACH * prompts))

    def bearable(self, decoding: int) -> int | None:
        """Prompt tokens that add ADDED to a step of so many rows; None as long as nobody can tell."""
        alone, each = self._alone(decoding), self._each()
        return int(ADDED * alone / each) if alone is not None and each is not None else None

    def _alone(self, decoding: int) -> float | None:
        """Seconds of a step that only decodes, from the mean of the most similar number of rows."""
        if not self._decoding or not decoding:
            return None
        size = min(self._decoding, key=lambda size: (abs(size - decoding.bit_length()), size))
        mean, each = self._decoding[size], self._each() or 0.0
        return max(mean.seconds / 2, mean.seconds + each * (decoding - mean.tokens))

    def _each(self) -> float | None:
        """Seconds that a prompt token adds."""
        if self._added is None or self._added.seconds <= 0:
            return None
        return self._added.seconds / self._added.tokens
