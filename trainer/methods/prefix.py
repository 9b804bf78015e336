"""Prefix-Tuning (Li & Liang 2021) on the keys and values themselves, without a reparametrising MLP.

The prefix starts as the KV of real text. It is parametrised as KV0 + s * delta, with s the spread of a layer's keys or
values, so that one learning rate suits every layer of every model: a step of Adam moves each number by about the rate,
in units of what is usual in its layer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply
from prefix_store.model.frozen import FrozenModel
from trainer.methods.base import KVMethod
from trainer.methods.start import initial_ids


class DirectKV(KVMethod):
    """`P` virtual tokens as free KV `[L, 2, Hkv, P, D]`, of which the first, a sink for attention, stays as it began.

    Keeping the first token is Cartridges' measure against forgetting (Eyuboglu et al. 2025). A single virtual token is
    tuned all the same.
    """

    def __init__(self, frozen: FrozenModel, spec: TrainingSpec, text: Iterable[int]) -> None:
        super().__init__(frozen, spec)
        kv = apply.prefill_kv(frozen, initial_ids(frozen.tokenizer, spec, text))
        kept = 1 if spec.virtual_tokens > 1 else 0
        self._sink, self._start = kv[:, :, :, :kept], kv[:, :, :, kept:]
        self._scale = self._start.std(dim=(2, 3, 4), keepdim=True)
        self.delta = torch.nn.Parameter(torch.zeros_like(self._start))

    def parameters(self) -> list[torch.nn.Parameter]:
        """delta `[L, 2, Hkv, P - 1, D]`, in units of the layer's spread."""
        return [self.delta]

    def kv(self) -> torch.Tensor:
        """The prefix now, `[L, 2, Hkv, P, D]`."""
        return torch.cat([self._sink, self._start + self._scale * self.delta], dim=3)
