"""Prefix-Tuning+ (arXiv 2506.13674, later PrefixMemory-Tuning): o_i = attention(q_i, K, V) + phi(q_i)^T M.

The prefix leaves the softmax and becomes a matrix beside it, so that it takes no attention from the prompt, however
long. There are no virtual tokens.

What the paper leaves open, and what was chosen here:
- One M or one a head: the equation is a head's, so M is `[D, D]` for each query head, also where heads share keys. One
  matrix of the whole width a layer would outweigh the memory that the paper reports.
- The query before or after rotation: after, as attention gets it.
- The start: M = 0, which is exactly the bare model. Its gradient, the sum of phi(q) (dL/do)^T, is not 0 there.
- Where it is added: to the head's output, before heads are joined and projected.
- phi: elu, by default, or gelu, both as they are: nothing is added, divided by or scaled.
- Learning rate: see the unit below. Weight decay leads back to the start.
"""

from __future__ import annotations

import dataclasses
from itertools import islice

import torch

from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply
from prefix_store.model.apply import PrefixRows
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.memory import Memory
from prefix_store.prefix import Method, PrefixManifest, Window
from prefix_store.tensors import PAYLOADS, PrefixTensors
from trainer.methods.start import Start, random_tokens, tensor_of
from trainer.methods.tuned import Tuned

PROBED = 64  # tokens whose values tell what is usual in a layer


class HeadMemory:
    """A memory M `[L, Hq, D, D]`, parametrised as M0 + s * delta, with s = spread of the layer's values / sqrt(D).

    A delta of random numbers around 1 then adds about as much as values differ by, and one learning rate suits every
    layer of every model.
    """

    def __init__(self, frozen: FrozenModel, spec: TrainingSpec, start: Start) -> None:
        self._frozen, self._feature_map = frozen, spec.feature_map
        geometry = frozen.geometry
        if isinstance(start, dict):
            memory = tensor_of(frozen, spec, start, PAYLOADS[Method.PREFIX_PLUS])
        else:
            shape = geometry.layers, geometry.query_heads, geometry.head_dim, geometry.head_dim
            memory = torch.zeros(shape, device=frozen.device)
        # the same tokens for every job, so that the unit is the model's alone
        values = apply.prefill_kv(frozen, list(islice(random_tokens(frozen.tokenizer, 0), PROBED)))[:, 1]
        self._memory = Tuned(memory, values.std(dim=(1, 2, 3))[:, None, None, None] / geometry.head_dim**0.5)
        self._nothing = torch.zeros(geometry.layers, 2, geometry.kv_heads, 0, geometry.head_dim, device=frozen.device)

    def parameters(self) -> list[torch.nn.Parameter]:
        """delta `[L, Hq, D, D]`."""
        return [self._memory.delta]

    def rows(self, count: int) -> PrefixRows:
        """Every row shares the one memory and stands where it would without."""
        memory = Memory(self._memory.value(), self._feature_map)
        bare = PrefixRows.shared(self._nothing, count, 0, Window.ALWAYS)
        return dataclasses.replace(bare, memories=(memory,) * count)

    def layers_without_gradient(self) -> list[int]:
        """Layers whose matrices the last backward did not reach."""
        gradient = self._memory.delta.grad
        if gradient is None:
            return list(range(self._frozen.geometry.layers))
        return [layer for layer in range(len(gradient)) if not gradient[layer].any()]

    def manifest(self) -> PrefixManifest:
        """Bound to this very base model."""
        return PrefixManifest(
            method=Method.PREFIX_PLUS,
            geometry=self._frozen.geometry,
            virtual_tokens=0,
            position_offset=0,
            base_digest=self._frozen.digest,
            feature_map=self._feature_map,
        )

    @torch.no_grad()
    def tensors(self) -> PrefixTensors:
        """A copy of the memory."""
        return {PAYLOADS[Method.PREFIX_PLUS]: self._memory.value().clone().cpu().contiguous()}
