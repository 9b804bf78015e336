"""Examples of prompt and completion, as token ids in batches. Knows nothing of methods, jobs or the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefix_store.errors import InvalidRequest, InvalidTrainingData
from prefix_store.model import prompt

IGNORED = -100  # the label of what is not a completion token
VALID_SHARE, VALID_MOST, VALID_FROM = 0.1, 64, 10


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its completion; the first `prompt_length` (at least 1) are only conditioned on."""

    ids: tuple[int, ...]
    prompt_length: int

    @property
    def targets(self) -> Sequence[int]:
        """The places in `ids` of the tokens that count in the loss, in order, none of them the first."""
        return range(self.prompt_length, len(self.ids))


@dataclass(frozen=True)
class TrainingData:
    """Examples to learn from, and examples to judge by (none where there are too few)."""

    train: list[Example]
    valid: list[Example]


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right, each `[B, T]`: token ids, true on real tokens, ids of completion tokens alone."""

    ids: torch.Tensor
    real_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(self.ids.to(device), self.real_mask.to(device), self.labels.to(device))


def tokenize(
    tokenizer: Any, examples: Sequence[Mapping[str, Any]], max_length: int, template: str | None = None
) -> list[Example]:
    """Encodes `{"prompt", "completion"}` objects as serving would, prompts in their template if there is one.

    What exceeds `max_length` tokens loses the prompt's beginning (BOS stays) and then the completion's end.
    Raises InvalidTrainingData with the line, counted from 1.
    """
    return [
        _tokenize_one(tokenizer, line, example, max_length, template) for line, example in enumerate(examples, start=1)
    ]


def _tokenize_one(
    tokenizer: Any, line: int, example: Mapping[str, Any], max_length: int, template: str | None
) -> Example:
    for field in ("prompt", "completion"):
        if not isinstance(example.get(field), str):
            raise InvalidTrainingData(f"line {line}: {field!r} must be a text", param="examples")
    if not example["completion"]:
        raise InvalidTrainingData(f"line {line}: the completion is empty", param="examples")
    try:
        start = prompt.encode(tokenizer, prompt.render(example["prompt"], template))
    except InvalidRequest as error:
        raise InvalidTrainingData(f"line {line}: {error.message}", param="examples") from None
    completion = prompt.encode_completion(tokenizer, example["completion"])
    start = _keep_end(start, max(1, max_length - len(completion)), tokenizer.bos_token_id)
    return Example(tuple(start + completion)[:max_length], len(start))


def _keep_end(ids: list[int], room: int, bos: int | None) -> list[int]:
    if len(ids) <= room:
        return ids
    if ids[0] == bos:
        return [ids[0], *ids[len(ids) - (room - 1) :]]
    return ids[-room:]


def split(examples: Sequence[Example], seed: int) -> TrainingData:
    """Sets a tenth aside for validation, 1 to 64 examples, the same for the same seed; none of fewer than ten."""
    if len(examples) < VALID_FROM:
        return TrainingData(list(examples), [])
    count = min(VALID_MOST, max(1, int(VALID_SHARE * len(examples))))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    # the order of the file is kept on both sides
    valid = set(order[:count])
    return TrainingData(
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
