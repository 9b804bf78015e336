"""Starts a Llama with heads that copy: a small model on little text would not find them by itself.

An induction head (Olsson et al. 2022) looks back for what followed the present token before. It takes two layers: heads
that bring to each token what stood before it, and heads that search by it and copy what they find. Both are written
into the random weights here, before the first step; training keeps them because they pay. Close in spirit to mimetic
initialisation (Trockman & Kolter 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM

HEADS = 3  # of each kind, fewer where the model has fewer KV heads
PREVIOUS, SEARCHING = 0, 1  # the layers that they stand in
# Large numbers change slowly: embeddings that the first steps cannot overturn, and a last norm that keeps logits small.
LOUD, QUIET = 25.0, 0.1  # embeddings; outputs of everything that is not placed here
COMMON = 0.5  # length of the direction that all embeddings share, in lengths of an embedding
SHARPNESS = 8.0  # score of the token before, above that of its neighbours
MATCH = 24.0  # score of the same token before
CARRIED, COPIED = 1.0, 3.0  # how far a head's output moves a token, in lengths of an embedding
FAST_PAIRS = 8  # rotary pairs that tell neighbouring positions apart
SLOW = 0.006  # radians a token: slower pairs hardly turn over a window of 256
# all that decides where a run starts
NUMBERS = (HEADS, PREVIOUS, SEARCHING, LOUD, QUIET, COMMON, SHARPNESS, MATCH, CARRIED, COPIED, FAST_PAIRS, SLOW)


@dataclass(frozen=True)
class Head:
    """Views of one head's weights: query, key and value `[D, E]`, output `[E, D]`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor

    @classmethod
    def of(cls, model: LlamaForCausalLM, layer: int, kv_head: int) -> Head:
        """The first query head of a KV head."""
        config: Any = model.config
        attention: Any = model.model.layers[layer].self_attn
        size, shared = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        own, common = slice(kv_head * size, (kv_head + 1) * size), slice(kv_head * shared * size, None)
        return cls(
            attention.q_proj.weight[common][:size],
            attention.k_proj.weight[own],
            attention.v_proj.weight[own],
            attention.o_proj.weight[:, common][:, :size],
        )

    def look_one_back(self, reader: torch.Tensor, turns: torch.Tensor) -> None:
        """Scores depend on the distance alone: a sum over fast pairs of cos(turn * (distance - 1)), largest at 1."""
        fast, half = turns[:FAST_PAIRS], len(turns)
        key, query = torch.zeros(2 * half), torch.zeros(2 * half)
        key[: len(fast)] = 1
        query[: len(fast)], query[half : half + len(fast)] = torch.cos(fast), -torch.sin(fast)
        drop = (1 - torch.cos(fast)).sum()  # from distance 1 to 0 or 2
        gain = torch.sqrt(SHARPNESS * math.sqrt(2 * half) / drop)
        self.query.copy_(gain * torch.outer(query, reader))
        self.key.copy_(gain * torch.outer(key, reader))

    def search(self, own: torch.Tensor, before: torch.Tensor, places: torch.Tensor, token: float) -> None:
        """A token's directions `own`, as the query, meet what was carried to others, from their predecessors."""
        expected = token**2 * len(own) / own.shape[1]  # squared length of a token in that many directions
        gain = math.sqrt(MATCH * math.sqrt(len(self.query)) / expected)
        self.query.zero_()[places] = gain * own
        self.key.zero_()[places] = gain * before

    def carry(self, read: torch.Tensor, write: torch.Tensor, gain: torch.Tensor) -> None:
        """What stands in the directions `read` of the tokens attended to is added in the directions `write`."""
        self.value.zero_()[: len(read)] = read
        self.output.zero_()[:, : len(write)] = gain * write.T


@torch.no_grad()
def install(model: LlamaForCausalLM, draws: torch.Generator) -> None:
    """Overwrites a few heads of the first two layers, and gives all embeddings a common direction to read."""
    config: Any = model.config
    table = model.model.embed_tokens.weight
    width, half = config.hidden_size, config.head_dim // 2
    table *= LOUD
    model.model.norm.weight /= LOUD
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= QUIET
        layer.mlp.down_proj.weight *= QUIET
    length = table.norm(dim=1).mean()
    directions = orthonormal(width, draws)
    table += COMMON * length * directions[0] - table.mean(0)
    # lengths after the norm in front of a layer, whose output has length sqrt(width)
    token, common = math.sqrt(width / (1 + COMMON**2)), COMMON * math.sqrt(width / (1 + COMMON**2))
    turns = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    slow = (turns < SLOW).nonzero().flatten()
    places = torch.cat([slow, slow + half])  # where slow pairs lie in a head
    for number in range(min(HEADS, config.num_key_value_heads)):
        searched = directions[1 + number * len(places) : 1 + (number + 1) * len(places)]
        carried = orthonormal(width, draws)[: len(searched)]
        before = Head.of(model, PREVIOUS, number)
        before.look_one_back(directions[0] / common, turns)
        before.carry(searched, carried, CARRIED * length / token)
        copied = orthonormal(width, draws)[: config.head_dim]
        searching = Head.of(model, SEARCHING, number)
        searching.search(searched, carried, places, token)
        searching.carry(copied, copied, COPIED * length / token)


def orthonormal(width: int, draws: torch.Generator) -> torch.Tensor:
    """A random rotation `[width, width]`."""
    return torch.linalg.qr(torch.randn(width, width, generator=draws))[0]
