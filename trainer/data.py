"""From a job's examples to token ids in batches. Knows nothing of methods, queues or the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from prefix_store.errors import InvalidTrainingData
from prefix_store.examples import VALIDATION, line_of
from prefix_store.jobs import TrainingSpec
from prefix_store.model.example import Example, ExampleEncoder
from prefix_store.model.frozen import FrozenModel
from trainer import defaults
from trainer.slices import Sliced, done

IGNORED = -100  # the label of what is not a completion token
VALID_SHARE, VALID_MOST, VALID_FROM = 0.1, 64, 10
T = TypeVar("T")


@dataclass(frozen=True)
class TrainingData:
    """Examples to learn from, examples to judge by (none where there are too few), and what a job does with them.

    `spec`: the job's, with the options that nobody chose filled in, which `chosen` names.
    """

    train: list[Example]
    valid: list[Example]
    spec: TrainingSpec
    chosen: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """What there is and what was chosen for it, for people to read."""
        longest = max(example.longest for example in self.train)
        found = f"training on {len(self.train)} examples of up to {longest} tokens, validating on {len(self.valid)}"
        options = ", ".join(f"{name} {getattr(self.spec, name)}" for name in self.chosen)
        return f"{found}; chosen for them: {options}" if options else found


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right, each `[B, T]`: token ids, true on real tokens, ids of completion tokens alone."""

    ids: torch.Tensor
    real_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(self.ids.to(device), self.real_mask.to(device), self.labels.to(device))


def prepare(
    frozen: FrozenModel,
    spec: TrainingSpec,
    examples: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]] = (),
) -> TrainingData:
    """All of `preparing` at once."""
    return done(preparing(frozen, spec, examples, validation))


def preparing(
    frozen: FrozenModel,
    spec: TrainingSpec,
    examples: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]] = (),
) -> Sliced[TrainingData]:
    """Encodes a job's examples, a line at a time, as serving would, and chooses what the job left open.

    `validation` none sets some of the examples aside. Raises InvalidTrainingData with the line, ChatTemplateMissing,
    and ContextLengthExceeded where the prefix leaves no room.
    """
    start = frozen.start_ids if frozen.is_encoder_decoder else ()
    asked, encoder = spec, ExampleEncoder(frozen.tokenizer, frozen.end_ids, spec.template, spec.chat_template, start)
    room = frozen.context_length
    lines = yield from _encoding(encoder, examples, room)
    judges = yield from _encoding(encoder, validation, room, VALIDATION)
    lengths = [example.longest for line in lines + judges for example in line]
    spec = defaults.fill_room(spec, lengths, frozen.context_length)
    room = defaults.room_for_text(spec, frozen.context_length)
    if max(lengths) > room:
        lines = yield from _encoding(encoder, examples, room)
        judges = yield from _encoding(encoder, validation, room, VALIDATION)
    learned, judged = (lines, judges) if judges else split(lines, spec.seed)
    train = [example for line in learned for example in line]
    spec = defaults.fill_pace(spec, [example.tokens for example in train])
    return TrainingData(train, [example for line in judged for example in line], spec, asked.unset)


def tokenize(
    tokenizer: Any, examples: Sequence[Mapping[str, Any]], max_length: int, template: str | None = None
) -> list[Example]:
    """Encodes canonical examples as a job does, one after another, by the tokenizer alone.

    Raises what `encode_lines` raises.
    """
    ends = frozenset() if tokenizer.eos_token_id is None else frozenset({tokenizer.eos_token_id})
    encoder = ExampleEncoder(tokenizer, ends, template)
    return [example for line in encode_lines(encoder, examples, max_length) for example in line]


def encode_lines(
    encoder: ExampleEncoder, examples: Sequence[Mapping[str, Any]], room: int, param: str = "examples"
) -> list[list[Example]]:
    """What becomes of each line. Raises InvalidTrainingData with the line, counted from 1, and ChatTemplateMissing."""
    return done(_encoding(encoder, examples, room, param))


def _encoding(
    encoder: ExampleEncoder, examples: Sequence[Mapping[str, Any]], room: int, param: str = "examples"
) -> Sliced[list[list[Example]]]:
    found = []
    for line, example in enumerate(examples, start=1):
        try:
            found.append(encoder.encode(example, room))
        except InvalidTrainingData as error:
            raise InvalidTrainingData(f"{line_of(param)} {line}: {error.message}", param=param) from None
        yield
    return found


def split(examples: Sequence[T], seed: int) -> tuple[list[T], list[T]]:
    """Sets a tenth aside for validation, 1 to 64 examples, the same for the same seed; none of fewer than ten."""
    if len(examples) < VALID_FROM:
        return list(examples), []
    count = min(VALID_MOST, max(1, int(VALID_SHARE * len(examples))))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    # the order of the file is kept on both sides
    valid = set(order[:count])
    return (
        [example for index, example in enumerate(examples) if index not in valid],
        [example for index, example in enumerate(examples) if index in valid],
    )


def shuffled_batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Batches without end and of equal size, epoch after epoch, in an order that only the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(examples))
    order: list[int] = []
    while True:
        if len(order) < size:
            order += torch.randperm(len(examples), generator=generator).tolist()
        chosen, order = order[:size], order[size:]
        yield [examples[index] for index in chosen]


def batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """Every example once, in order."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def collate_sources(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """What an encoder reads, padded on the right to the longest, `[B, S]`: token ids, and true on real tokens."""
    shape = len(examples), max(len(example.source) for example in examples)
    ids, real_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.source)] = torch.tensor(example.source)
        real_mask[row, : len(example.source)] = True
    return ids, real_mask


def collate(examples: Sequence[Example]) -> Batch:
    """Pads on the right to the longest."""
    shape = len(examples), max(len(example.ids) for example in examples)
    batch = Batch(
        torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool), torch.full(shape, IGNORED)
    )
    for row, example in enumerate(examples):
        length, targets = len(example.ids), list(example.targets)
        batch.ids[row, :length] = torch.tensor(example.ids)
        batch.real_mask[row, :length] = True
        batch.labels[row, targets] = batch.ids[row, targets]
    return batch
