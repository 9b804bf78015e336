"""Prefix-Tuning (Li & Liang 2021) with the paper's reparametrisation: KV = W2 tanh(W1 E + b1) + b2.

One MLP with a bottleneck makes all layers' keys and values of a virtual token from one embedding, which ties them
together. Only what it makes is kept. E is as wide as a layer's keys, as PEFT has it: the paper's hidden size, but for
models with grouped queries.
"""

from __future__ import annotations

import torch

from prefix_store.jobs import TrainingSpec
from prefix_store.model.frozen import FrozenModel
from trainer.methods.base import KVMethod
from trainer.methods.encoder import Encoder
from trainer.methods.prefix import split_sink
from trainer.methods.start import Start, initial_kv


class MLPPrefix(KVMethod):
    """`P` virtual tokens whose KV `[L, 2, Hkv, P, D]` an MLP makes; the first stays as it began, as in `prefix`."""

    def __init__(self, frozen: FrozenModel, spec: TrainingSpec, start: Start) -> None:
        super().__init__(frozen, spec)
        self._sink, tuned = split_sink(initial_kv(frozen, spec, start), spec)
        width, middle = tuned.shape[2] * tuned.shape[4], spec.bottleneck
        spread = tuned.std(dim=(2, 3, 4))[:, :, None].expand(-1, -1, width)  # [L, 2, Hkv * D]
        self.encoder = Encoder(
            lambda: self.body(width, middle),
            width,
            target=tuned.permute(3, 0, 1, 2, 4).flatten(1),
            spread=spread.flatten(),
            seed=spec.seed,
        )

    @staticmethod
    def body(width: int, middle: int) -> torch.nn.Module:
        """All of the MLP but its last layer."""
        return torch.nn.Sequential(torch.nn.Linear(width, middle), torch.nn.Tanh())

    def parameters(self) -> list[torch.nn.Parameter]:
        """E `[P - 1, Hkv * D]`, W1, b1, W2 `[L * 2 * Hkv * D, bottleneck]` and b2, as distances from their start."""
        return self.encoder.parameters()

    def kv(self) -> torch.Tensor:
        """What the MLP makes now, `[L, 2, Hkv, P, D]`."""
        layers, two, heads, _, size = self._sink.shape
        made = self.encoder.output().view(-1, layers, two, heads, size).permute(1, 2, 3, 0, 4)
        return torch.cat([self._sink, made], dim=3)
