"""KV prefixes of encoder-decoder models: one for each stack, which share nothing (Li & Liang 2021).

With `prefix_mlp` these are the paper's three embeddings and three MLPs. Virtual tokens take no positions: as in the
authors' BART, source and answer begin at 0, where the model has learnt that they begin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import chain

import torch

from prefix_store.geometry import Stack
from prefix_store.jobs import TrainingSpec
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.rows import StackRows
from prefix_store.prefix import Method, PrefixManifest
from prefix_store.tensors import PAYLOADS, STACKS, PrefixTensors
from trainer.methods.base import KVMethod, NewMethod, TuningMethod
from trainer.methods.start import Start, initial_kvs

SEEDS = 2**63
NewKVMethod = Callable[[FrozenModel, TrainingSpec, Start], KVMethod]


class StackedKV:
    """`P` virtual tokens in each of the stacks that the job asks for, by default all three."""

    def __init__(self, method: NewKVMethod, frozen: FrozenModel, spec: TrainingSpec, start: Start) -> None:
        self._frozen, self._virtual_tokens = frozen, spec.virtual_tokens
        self._parts: dict[Stack, KVMethod] = {}
        for number, (stack, kv) in enumerate(initial_kvs(frozen, spec, start).items()):
            own = dataclasses.replace(spec, seed=(spec.seed + number) % SEEDS)
            self._parts[stack] = method(frozen, own, {PAYLOADS[Method.PREFIX]: kv})

    def parameters(self) -> list[torch.nn.Parameter]:
        """Each stack's, one stack after another."""
        return list(chain.from_iterable(part.parameters() for part in self._parts.values()))

    def rows(self, count: int) -> StackRows:
        """Every row shares the one prefix."""
        kvs = {stack: part.tracked() for stack, part in self._parts.items()}
        return StackRows.shared(kvs, count, 0)

    def layers_without_gradient(self) -> list[str]:
        """Stacks and layers whose keys and values the last backward did not reach."""
        return [f"{stack} {lost}" for stack, part in self._parts.items() for lost in part.layers_without_gradient()]

    def manifest(self) -> PrefixManifest:
        """Bound to this very base model."""
        return PrefixManifest(
            method=Method.PREFIX,
            geometry=self._frozen.geometry,
            virtual_tokens=self._virtual_tokens,
            position_offset=0,
            base_digest=self._frozen.digest,
            stacks=tuple(self._parts),
        )

    def tensors(self) -> PrefixTensors:
        """A copy of the keys and values, by stack."""
        return {STACKS[stack]: next(iter(part.tensors().values())) for stack, part in self._parts.items()}


def by_stack(method: NewKVMethod) -> NewMethod:
    """The method, once for each stack where the model has several."""

    def new(frozen: FrozenModel, spec: TrainingSpec, start: Start) -> TuningMethod:
        return StackedKV(method, frozen, spec, start) if frozen.is_encoder_decoder else method(frozen, spec, start)

    return new
