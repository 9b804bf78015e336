"""Starts a BART with heads that copy from the source: on little text it would not find them by itself.

The bundled model's start (`trainer/bundled/induction.py`), across attentions: the first layer of the encoder brings to
each token the one before it, and the first cross-attention searches by that for the token which the decoder has just
said, and copies. BART learns its positions, so they start as waves, whose products depend on the distance of two.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import BartForConditionalGeneration

from trainer.bundled.induction import HEADS, LOUD, MATCH, QUIET, SHARPNESS, Head, orthonormal

WAVE = 16  # numbers of a token's width for each wave
FASTEST, SLOWEST = 2.5, 0.02  # radians a token; waves are spaced evenly in their logarithms
POSITION = 0.5  # length of a position, in lengths of a token's embedding
CARRIED, COPIED = 1.0, 3.0  # how far a head's output moves a token, in lengths of what it reads
REMAINS = 0.75  # of a token's length, behind the norm that follows what was carried
# all that decides where a run starts
NUMBERS = (HEADS, LOUD, QUIET, SHARPNESS, MATCH, WAVE, FASTEST, SLOWEST, POSITION, CARRIED, COPIED, REMAINS)


def head(attention: Any, number: int) -> Head:
    """One head of a BART's attention."""
    own = slice(number * attention.head_dim, (number + 1) * attention.head_dim)
    query, key, value = (getattr(attention, name).weight[own] for name in ("q_proj", "k_proj", "v_proj"))
    return Head(query, key, value, attention.out_proj.weight[:, own])


@torch.no_grad()
def install(model: BartForConditionalGeneration, draws: torch.Generator) -> None:
    """Overwrites a few heads of the first layers, and both tables of positions."""
    width, size = model.config.d_model, model.config.d_model // model.config.encoder_attention_heads
    encoder, decoder = model.model.encoder, model.model.decoder
    table, directions = model.model.shared.weight, orthonormal(width, draws)
    turns = torch.logspace(math.log10(FASTEST), math.log10(SLOWEST), width // WAVE)
    waves, rest = directions[: 2 * len(turns)], directions[2 * len(turns) :]
    table *= LOUD
    table -= table @ waves.T @ waves
    decoder.layers[-1].final_layer_norm.weight /= LOUD  # keeps the logits small
    for layer in (*encoder.layers, *decoder.layers):
        for quiet in (layer.self_attn.out_proj, layer.fc2, *_crossing(layer)):
            quiet.weight *= QUIET
    length = table.norm(dim=1).mean()
    for stack in (encoder, decoder):
        positions = stack.embed_positions.weight
        angles = torch.arange(len(positions))[:, None] * turns
        each = POSITION * length / math.sqrt(len(turns))
        positions.copy_(each * torch.cat([angles.cos(), angles.sin()], 1) @ waves)
    # lengths behind a norm, whose output has length sqrt(width)
    token = math.sqrt(width / (1 + POSITION**2))
    for number, searched in enumerate(rest.split(size)[:HEADS]):
        carried, copied = (orthonormal(width, draws)[: len(searched)] for _ in range(2))
        before = head(encoder.layers[0].self_attn, number)
        look_one_back(before, waves, turns, POSITION * token)
        before.carry(searched, carried, torch.tensor(CARRIED))
        searching = head(decoder.layers[0].encoder_attn, number)
        searching.search(searched, carried, torch.arange(len(searched)), REMAINS * token)
        searching.carry(copied, copied, torch.tensor(COPIED))


def look_one_back(head: Head, waves: torch.Tensor, turns: torch.Tensor, length: float) -> None:
    """Scores are a sum over waves of cos(turn * (distance - 1)); positions have that `length` in their directions."""
    cosines, sines = waves.split(len(turns))
    turn, unturn = torch.cos(turns)[:, None], torch.sin(turns)[:, None]
    drop = length**2 / len(turns) * (1 - torch.cos(turns)).sum()  # from distance 1 to 0 or 2
    gain = torch.sqrt(SHARPNESS * math.sqrt(len(head.query)) / drop)
    head.key.zero_()[: len(waves)] = gain * waves
    one_back = torch.cat([turn * cosines + unturn * sines, turn * sines - unturn * cosines])
    head.query.zero_()[: len(waves)] = gain * one_back


def _crossing(layer: Any) -> list[Any]:
    return [layer.encoder_attn.out_proj] if hasattr(layer, "encoder_attn") else []
