"""Workload W: 64 greedy requests over 32 prefixes of 20 virtual tokens, prompts of 16 to 128 tokens, 64 new tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prefix_store.geometry import ModelGeometry, Stack
from server.scheduler.messages import GenerationRequest, PrefixPayload
from server.scheduler.sampling_params import SamplingParams


@dataclass(frozen=True)
class Item:
    """One request of a workload: its prompt and the number of its prefix."""

    prompt: tuple[int, ...]
    prefix: int


@dataclass(frozen=True)
class Workload:
    """The numbers of a workload; W is what the defaults say."""

    requests: int = 64
    prefixes: int = 32
    virtual_tokens: int = 20
    prompt_tokens: tuple[int, int] = (16, 128)
    new_tokens: int = 64

    def items(self, vocabulary: int, seed: int = 0) -> list[Item]:
        """Its requests; every prefix is used equally often."""
        draw = random.Random(seed)
        prefixes = [index % self.prefixes for index in range(self.requests)]
        draw.shuffle(prefixes)
        lengths = [draw.randint(*self.prompt_tokens) for _ in range(self.requests)]
        return [
            Item(tuple(draw.randrange(vocabulary) for _ in range(length)), prefix)
            for length, prefix in zip(lengths, prefixes, strict=True)
        ]

    def params(self) -> SamplingParams:
        """Greedy, and always as many tokens as were asked for."""
        return SamplingParams(max_tokens=self.new_tokens, temperature=0.0, ignore_eos=True)

    def requests_for(
        self, items: Sequence[Item], payloads: Sequence[PrefixPayload] | None = None, tenant: str = ""
    ) -> list[GenerationRequest]:
        """The items as the engine takes them, named by their number; without payloads they are the bare model's."""
        params = self.params()
        return [
            GenerationRequest(str(index), tenant, item.prompt, params, payloads[item.prefix] if payloads else None)
            for index, item in enumerate(items)
        ]


W = Workload()


def flat_prefixes(workload: Workload, geometry: ModelGeometry, seed: int = 1) -> torch.Tensor:
    """`[N, P, 2 * L * Hkv * D]`: prefixes in PEFT's flat layout, at the scale of real keys and values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(workload.prefixes, workload.virtual_tokens, geometry.kv_numbers_per_token, generator=generator)


def payloads(
    workload: Workload, geometry: ModelGeometry, dtype: torch.dtype = torch.float32, seed: int = 1
) -> list[PrefixPayload]:
    """The same prefixes as the engine takes them."""
    layers, two, heads, size = geometry.kv_shape
    flat = flat_prefixes(workload, geometry, seed).view(-1, workload.virtual_tokens, layers, two, heads, size)
    return [payload(str(index), kv.permute(1, 2, 3, 0, 4).to(dtype)) for index, kv in enumerate(flat)]


def stack_prefixes(workload: Workload, geometry: ModelGeometry, seed: int = 1) -> list[dict[Stack, torch.Tensor]]:
    """An encoder-decoder model's prefixes, canonical KV `[L, 2, H, P, D]` by stack, at the scale of real ones."""
    draws = torch.Generator().manual_seed(seed)

    def kv(stack: Stack) -> torch.Tensor:
        layers, two, heads, size = geometry.kv_shape_of(stack)
        return torch.randn(layers, two, heads, workload.virtual_tokens, size, generator=draws)

    return [{stack: kv(stack) for stack in Stack} for _ in range(workload.prefixes)]


def payload(digest: str, kv: torch.Tensor) -> PrefixPayload:
    """Canonical KV `[L, 2, Hkv, P, D]` as the engine takes it."""
    return PrefixPayload(digest, kv.shape[3], kv.shape[3], slides=True, tensor=kv.contiguous())
