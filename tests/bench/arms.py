"""The contestants of workload W that are this engine: with tuned prefixes, without, and with the same as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from server.engine.engine import Engine
from server.scheduler.messages import PrefixPayload
from tests.bench.drive import Tokens, drain
from tests.bench.shapes import Shape
from tests.bench.workload import Item, Workload, payload

OURS = "antefix, mixed prefixes"
BARE = "antefix, no prefix"
TUNED = "antefix, one request a task"
TEXT = "antefix, 8 shots as text"
CACHED = "antefix, 8 shots as text, cached"


class Arm(Protocol):
    """Generates for a list of requests; `run` is what gets timed."""

    name: str

    def run(self, items: Sequence[Item]) -> Tokens:
        """New tokens of every request, in order."""


class Antefix:
    """This engine, all requests submitted at once; without payloads it serves the bare model."""

    def __init__(
        self, name: str, engine: Engine, workload: Workload, payloads: Sequence[PrefixPayload] | None = None
    ) -> None:
        self.name = name
        self._engine = engine
        self._workload = workload
        self.payloads = payloads

    def run(self, items: Sequence[Item]) -> Tokens:
        return drain(self._engine, self._workload.requests_for(items, self.payloads))


class Shots(Antefix):
    """What a prefix does, said as text in front of every prompt instead."""

    def __init__(self, engine: Engine, workload: Workload, texts: Sequence[tuple[int, ...]]) -> None:
        super().__init__(TEXT, engine, workload)
        self._texts = texts

    def run(self, items: Sequence[Item]) -> Tokens:
        return super().run([Item((*self._texts[item.prefix], *item.prompt), item.prefix) for item in items])


def shots(shape: Shape, tasks: int, length: int, seed: int = 2) -> list[tuple[int, ...]]:
    """A text for each task: random ids, for what they say changes no timing."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(ids) for ids in torch.randint(shape.vocabulary, (tasks, length), generator=generator).tolist()]


@torch.inference_mode()
def cached(model: PreTrainedModel, texts: Sequence[tuple[int, ...]]) -> list[PrefixPayload]:
    """The texts' keys and values by the plain model: what a cache of text prefixes would hold."""
    found = []
    for index, text in enumerate(texts):
        layers = model(torch.tensor([text]), use_cache=True, logits_to_keep=1).past_key_values.layers
        kv = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
        found.append(payload(f"text {index}", kv))
    return found
