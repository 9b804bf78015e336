"""Prefix-Tuning (Li & Liang 2021) on the keys and values themselves, without a reparametrising MLP.

The prefix starts as the KV of real text. It is parametrised as KV0 + s * delta, with s the spread of a layer's keys or
values, so that one learning rate suits every layer of every model: a step of Adam moves each number by about the rate,
in units of what is usual in its layer.
"""

from __future__ import annotations

import torch

from prefix_store.jobs import TrainingSpec
from prefix_store.model.frozen import FrozenModel
from trainer.methods.base import KVMethod
from trainer.methods.start import Start, initial_kv


class DirectKV(KVMethod):
    """`P` virtual tokens as free KV `[L, 2, Hkv, P, D]`, of which the first, a sink for attention, stays as it began.

    Keeping the first token is Cartridges' measure against forgetting (Eyuboglu et al. 2025); `spec.frozen_tokens` says
    how many are kept. The last virtual token is tuned all the same.
    """

    def __init__(self, frozen: FrozenModel, spec: TrainingSpec, start: Start) -> None:
        super().__init__(frozen, spec)
        self._sink, self._start = split_sink(initial_kv(frozen, spec, start), spec)
        self._scale = self._start.std(dim=(2, 3, 4), keepdim=True)
        self.delta = torch.nn.Parameter(torch.zeros_like(self._start))

    def parameters(self) -> list[torch.nn.Parameter]:
        """delta `[L, 2, Hkv, P - 1, D]`, in units of the layer's spread."""
        return [self.delta]

    def kv(self) -> torch.Tensor:
        """The prefix now, `[L, 2, Hkv, P, D]`."""
        return torch.cat([self._sink, self._start + self._scale * self.delta], dim=3)


def split_sink(kv: torch.Tensor, spec: TrainingSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """KV `[L, 2, Hkv, P, D]` as the first tokens, which are kept, and the others, which are tuned: one at least."""
    kept = spec.virtual_tokens - tuned_tokens(spec)
    return kv[:, :, :, :kept], kv[:, :, :, kept:]


def tuned_tokens(spec: TrainingSpec) -> int:
    """How many of a job's virtual tokens are tuned."""
    return max(1, spec.virtual_tokens - spec.frozen_tokens)
