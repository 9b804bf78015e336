"""The frozen model over the examples of any number of prefixes at once: what predicts each token that counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prefix_store.model import apply, both
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.rows import PrefixRows, Rows, StackRows, stacked
from trainer import objective
from trainer.data import IGNORED, Example, collate, collate_sources
from trainer.head import Objective
from trainer.packed import Row
from trainer.training_model import TrainingModel


@dataclass(frozen=True)
class Group:
    """Examples that share a prefix, which `prefixes` holds once for each of them; None is the bare model."""

    prefixes: Rows | None
    examples: Sequence[Example]

    @property
    def labels(self) -> torch.Tensor:
        """`[C]`: the ids of the examples' target tokens, one example after another."""
        return torch.tensor([example.ids[place] for example in self.examples for place in example.targets])

    @property
    def tokens(self) -> int:
        """All tokens of the examples."""
        return sum(example.tokens for example in self.examples)


def logits(frozen: FrozenModel, groups: Sequence[Group]) -> list[torch.Tensor]:
    """For each group `[C, V]`, what predicts each of its `labels`; differentiable in the prefixes.

    Rows do not see one another: a group's logits are those that it would get alone. A TrainingModel takes all groups
    in one pass, and so does an encoder-decoder model, padded; any other frozen model that is attached takes one after
    another.
    """
    if frozen.is_encoder_decoder:
        return list(_logits_of_both(frozen, groups).split(_lengths(groups)))
    if isinstance(frozen, TrainingModel):
        return list(frozen.head(_hidden(frozen, groups)).split(_lengths(groups)))
    found = []
    for group in groups:
        batch = collate(group.examples).to(frozen.device)
        every = apply.logits(frozen, batch.ids, batch.real_mask, _plain(group.prefixes))
        found.append(every[:, :-1][batch.labels[:, 1:] != IGNORED])
    return found


def sums(frozen: FrozenModel, groups: Sequence[Group], objectives: Sequence[Objective]) -> list[torch.Tensor]:
    """For each group the sum of its objective over its labels, from their logits, float32.

    An objective gets the logits of some of a group's labels and the slice that these are, and returns their sum.
    Differentiable in the prefixes and in nothing else that an objective knows. A TrainingModel holds the logits of a
    few labels at a time, so its memory is bounded however large the vocabulary.
    """
    if isinstance(frozen, TrainingModel):
        return list(frozen.head.sums(_hidden(frozen, groups), _lengths(groups), objectives))
    return [
        measure(found, slice(0, len(found))) for found, measure in zip(logits(frozen, groups), objectives, strict=True)
    ]


def losses(frozen: FrozenModel, groups: Sequence[Group]) -> list[torch.Tensor]:
    """For each group what its examples ask for, in nats, summed over its labels; differentiable in the prefixes."""
    return sums(frozen, groups, [objective.of(group.examples) for group in groups])


def _logits_of_both(frozen: FrozenModel, groups: Sequence[Group]) -> torch.Tensor:
    """`[C, V]`: what predicts all groups' labels."""
    examples = [example for group in groups for example in group.examples]
    sources, source_mask = (part.to(frozen.device) for part in collate_sources(examples))
    batch = collate(examples).to(frozen.device)
    prefixes = StackRows.joined([stacked(group.prefixes, len(group.examples), frozen.device) for group in groups])
    every = both.logits(frozen, sources, source_mask, batch.ids, batch.real_mask, prefixes)
    return every[:, :-1][batch.labels[:, 1:] != IGNORED]


def _plain(prefixes: Rows | None) -> PrefixRows | None:
    """Those of a decoder-only model."""
    assert not isinstance(prefixes, StackRows)
    return prefixes


def _hidden(frozen: TrainingModel, groups: Sequence[Group]) -> torch.Tensor:
    """`[C, E]`: what the logits of all groups' labels come from."""
    rows = [
        Row(example.ids, _plain(group.prefixes), index)
        for group in groups
        for index, example in enumerate(group.examples)
    ]
    places = [[place - 1 for place in example.targets] for group in groups for example in group.examples]
    return frozen.hidden(rows, places)


def _lengths(groups: Sequence[Group]) -> list[int]:
    return [sum(len(example.targets) for example in group.examples) for group in groups]
