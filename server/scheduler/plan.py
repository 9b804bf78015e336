"""One step as integers: what to copy into place, then which row runs which tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefix_store.errors import GenerationFailed
from server.scheduler.messages import PrefixPayload, TokenLogprob
from server.scheduler.sequence import Sequence
from server.scheduler.slots import Extent


@dataclass(frozen=True)
class Load:
    """Bring a prefix from the host into its extent: keys and values, a soft prompt to make them of, or a memory."""

    payload: PrefixPayload
    extent: Extent

    def is_read_by(self, sequence: Sequence) -> bool:
        """Whether a sequence reads that prefix there."""
        resident = sequence.resident
        return resident is not None and (resident.payload.digest, resident.extent) == (self.payload.digest, self.extent)


@dataclass(frozen=True)
class Move:
    """Copy the first `size` slots: of a row that has outgrown its extent, or of a beam that another goes on from."""

    source: Extent
    target: Extent
    size: int


@dataclass(frozen=True)
class Row:
    """`count` tokens of one sequence, from index `start` of its own tokens on. `samples`: the last one predicts."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        """Index of the first of the sequence's tokens behind this row's, which its logits give if that is a new one."""
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether this row reaches the sequence's last token, so that its logits give the next one.

        In a step that is planned before the one before it is read, the row's own token is yet to come.
        """
        return self.end >= len(self.sequence.tokens)

    @property
    def is_alive(self) -> bool:
        """Whether its sequence still runs: it may have ended since the row was planned."""
        return self.sequence.owner.extent is not None

    @property
    def encodes(self) -> bool:
        """Whether the encoder reads the sequence's source in this step."""
        return self.start == 0 and self.sequence.is_unread

    @property
    def cost(self) -> int:
        """Tokens of the step that it takes, those that the encoder reads among them."""
        return self.count + (self.sequence.source_length if self.encodes else 0)

    @property
    def scored(self) -> range:
        """Own indices whose logits are wanted as prompt log-probabilities: index i predicts token i + 1."""
        if not self.sequence.wants_prompt_logprobs:
            return range(0)
        return range(self.start, min(self.end, self.sequence.prompt_length - 1))


@dataclass(frozen=True)
class StepPlan:
    """`transfers` happen first and in order: a later one may overwrite slots that an earlier one has read."""

    transfers: tuple[Load | Move, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Candidate:
    """A token that a beam may go on with. `logprob` is after the row's options, `scored` the model's own."""

    token_id: int
    logprob: float
    scored: TokenLogprob | None = None


@dataclass(frozen=True)
class RowResult:
    """What the engine found for one row. `token_id` None where the row does not sample or has failed.

    A beam gets `candidates` in its stead, best first: its group's width of them and as many as may end it.
    """

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    scored: list[TokenLogprob] = field(default_factory=list)
    error: GenerationFailed | None = None
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class StepDone:
    """What came of a plan. `plan` is what of it was carried out: rows may have been left out or cut short.

    `results` are those of its rows. What is `lost` there was no memory to bring, and whoever reads it was left out.
    `begun` is when the device was asked, by the host's performance counter.
    """

    plan: StepPlan
    results: list[RowResult]
    begun: float
    lost: tuple[Load, ...] = ()
