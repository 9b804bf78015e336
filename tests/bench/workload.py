"""Workload W: 64 greedy requests over 32 prefixes of 20 virtual tokens, prompts of 16 to 128 tokens, 64 new tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

REQUESTS, PREFIXES, VIRTUAL_TOKENS, NEW_TOKENS = 64, 32, 20, 64
PROMPT_TOKENS = (16, 128)
GPT2_SMALL = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}


@dataclass(frozen=True)
class Item:
    """One request of a workload: its prompt and the number of its prefix."""

    prompt: tuple[int, ...]
    prefix: int


def items(seed: int = 0) -> list[Item]:
    """The requests of W; each prefix is used by two of them."""
    draw = random.Random(seed)
    prefixes = [index % PREFIXES for index in range(REQUESTS)]
    draw.shuffle(prefixes)
    lengths = [draw.randint(*PROMPT_TOKENS) for _ in range(REQUESTS)]
    vocabulary = GPT2_SMALL["vocab_size"]
    return [
        Item(tuple(draw.randrange(vocabulary) for _ in range(length)), prefix)
        for length, prefix in zip(lengths, prefixes, strict=True)
    ]


def gpt2_small(attention: str, seed: int = 0) -> PreTrainedModel:
    """A GPT-2-small-shaped model with seeded random weights, float32."""
    torch.manual_seed(seed)
    config = GPT2Config(**GPT2_SMALL, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def flat_prefixes(seed: int = 1) -> torch.Tensor:
    """`[32, P, 2 * L * d]`: prefixes in PEFT's flat layout, at the scale of real keys and values."""
    columns = 2 * GPT2_SMALL["n_layer"] * GPT2_SMALL["n_embd"]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(PREFIXES, VIRTUAL_TOKENS, columns, generator=generator)
