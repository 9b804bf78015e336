"""The frozen model over the examples of any number of prefixes at once: what predicts each token that counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prefix_store.model import apply
from prefix_store.model.apply import PrefixRows
from prefix_store.model.frozen import FrozenModel
from trainer.data import IGNORED, Example, collate


@dataclass(frozen=True)
class Group:
    """Examples that share a prefix, which `prefixes` holds once for each of them; None is the bare model."""

    prefixes: PrefixRows | None
    examples: Sequence[Example]

    @property
    def labels(self) -> torch.Tensor:
        """`[C]`: the ids of the examples' target tokens, one example after another."""
        return torch.tensor([example.ids[place] for example in self.examples for place in example.targets])

    @property
    def tokens(self) -> int:
        """All tokens of the examples."""
        return sum(len(example.ids) for example in self.examples)


def logits(frozen: FrozenModel, groups: Sequence[Group]) -> list[torch.Tensor]:
    """For each group `[C, V]`, what predicts each of its `labels`; differentiable in the prefixes.

    Rows do not see one another: a group's logits are those that it would get alone.
    """
    found = []
    for group in groups:
        batch = collate(group.examples).to(frozen.device)
        every = apply.logits(frozen, batch.ids, batch.real_mask, group.prefixes)
        found.append(every[:, :-1][batch.labels[:, 1:] != IGNORED])
    return found
