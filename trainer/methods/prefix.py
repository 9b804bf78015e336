"""Prefix-Tuning (Li & Liang 2021) on the keys and values themselves, without a reparametrising MLP.

The prefix starts as the KV of real text, since random rows wreck a trained model and zero rows never separate. It is
parametrised as KV0 + s * delta, with s the spread of a layer's keys or values, so that one learning rate suits every
layer of every model: a step of Adam moves each number by about the rate, in units of what is usual in its layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, cycle, islice
from typing import Any

import torch

from prefix_store.errors import InvalidRequest
from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import Method, PrefixManifest, Window
from prefix_store.tensors import PAYLOADS, PrefixTensors

WINDOW = Window.ALWAYS


class DirectKV:
    """`P` virtual tokens as free KV `[L, 2, Hkv, P, D]`, of which the first, a sink for attention, stays as it began.

    Keeping the first token is Cartridges' measure against forgetting (Eyuboglu et al. 2025). A single virtual token is
    tuned all the same.
    """

    def __init__(self, frozen: FrozenModel, spec: TrainingSpec, text: Iterable[int]) -> None:
        self._frozen = frozen
        self._length = spec.virtual_tokens
        kv = apply.prefill_kv(frozen, initial_ids(frozen.tokenizer, spec, text))
        kept = 1 if self._length > 1 else 0
        self._sink, self._start = kv[:, :, :, :kept], kv[:, :, :, kept:]
        self._scale = self._start.std(dim=(2, 3, 4), keepdim=True)
        self.delta = torch.nn.Parameter(torch.zeros_like(self._start))

    def kv(self) -> torch.Tensor:
        """The prefix now, `[L, 2, Hkv, P, D]`."""
        return torch.cat([self._sink, self._start + self._scale * self.delta], dim=3)

    def parameters(self) -> list[torch.nn.Parameter]:
        """delta `[L, 2, Hkv, P - 1, D]`, in units of the layer's spread."""
        return [self.delta]

    def rows(self, count: int) -> apply.PrefixRows:
        """Every row shares the one prefix; real tokens start after it."""
        return apply.PrefixRows.shared(self.kv(), count, self._length, WINDOW)

    def layers_without_gradient(self) -> list[int]:
        """Layers whose keys and values the last backward did not reach."""
        gradient = self.delta.grad
        if gradient is None:
            return list(range(len(self.delta)))
        return [layer for layer in range(len(gradient)) if not gradient[layer].any()]

    def manifest(self) -> PrefixManifest:
        """Bound to this very base model."""
        return PrefixManifest(
            method=Method.PREFIX,
            geometry=self._frozen.geometry,
            virtual_tokens=self._length,
            position_offset=self._length,
            base_digest=self._frozen.digest,
            window=WINDOW,
        )

    def tensors(self) -> PrefixTensors:
        """`self.kv`, detached."""
        return {PAYLOADS[Method.PREFIX]: self.kv().detach().cpu().contiguous()}


def initial_ids(tokenizer: Any, spec: TrainingSpec, text: Iterable[int]) -> list[int]:
    """P token ids to start from: BOS where there is one, then `spec.init_text` or else `text`, repeated if short.

    Raises InvalidRequest where neither has a token.
    """
    if spec.init_text is not None:
        text = tokenizer(spec.init_text, add_special_tokens=False, verbose=False).input_ids
    bos = tokenizer.bos_token_id
    words = [token for token in islice(text, 2 * spec.virtual_tokens) if token not in (bos, tokenizer.eos_token_id)]
    if not words:
        raise InvalidRequest("the text to start the prefix from has no tokens", param="init_text")
    return list(islice(chain([bos] if bos is not None else [], cycle(words)), spec.virtual_tokens))
