"""What a training step takes in memory, and how much there is for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from prefix_store.model.frozen import FrozenModel
from trainer.data import Example

# Of what is free when the worker starts. The server beside it, and the system's own caches, want the rest.
SHARE = 0.5
# Numbers that a layer keeps for the backward, for each token: so many times its hidden size, its heads' outputs, its
# keys and values, and its feed-forward's width; and so many for each head and each token that is attended to.
HIDDEN, HEADS, KV, FORWARD, SCORES = 8, 3, 6, 4, 4
LOGITS = 4  # for each token and word of the vocabulary
STATE = 6  # a prefix, its gradient, two moments, its best, and one on its way
BYTES = 4  # float32


def of_step(frozen: FrozenModel, examples: Sequence[Example], rows: int, virtual_tokens: int) -> int:
    """Bytes that a forward and backward over `rows` of the longest examples behind a prefix take at most, about.

    A plain count of what the reference's layers keep, attention written out in full; a forward that keeps less takes
    less. A layer beside an encoder counts for two, for its second attention.
    """
    geometry, encoder = frozen.geometry, frozen.geometry.encoder
    tokens, source = max(len(example.ids) for example in examples), max(len(example.source) for example in examples)
    layers = geometry.layers * tokens * _layer(frozen, geometry.kv_heads, virtual_tokens + tokens)
    prefixes = geometry.kv_numbers_per_token * virtual_tokens
    if encoder is not None:
        layers += geometry.layers * tokens * _layer(frozen, geometry.kv_heads, virtual_tokens + source)
        layers += encoder.layers * source * _layer(frozen, encoder.heads, virtual_tokens + source)
        prefixes = 2 * prefixes + 2 * encoder.layers * encoder.heads * encoder.head_dim * virtual_tokens
    numbers = rows * (layers + tokens * LOGITS * frozen.vocabulary_size + prefixes)
    return BYTES * (numbers + STATE * prefixes)


def _layer(frozen: FrozenModel, kv_heads: int, seen: int) -> int:
    """Numbers that a layer keeps for a token that attends to `seen`."""
    geometry = frozen.geometry
    layer = HIDDEN * geometry.hidden_size + HEADS * geometry.query_heads * geometry.head_dim
    layer += KV * kv_heads * geometry.head_dim + FORWARD * _width(frozen)
    return layer + SCORES * geometry.query_heads * seen


def free(device: torch.device) -> int:
    """Bytes that training may take on a device unless it is told otherwise."""
    if device.type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(device)[0])
    return int(SHARE * min(_available(), _allowed()))


def _width(frozen: FrozenModel) -> int:
    """Of a layer's feed-forward; transformers' families call it by several names, and four times the hidden size is
    what most have."""
    config = frozen.model.config.get_text_config()
    for name in ("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "d_ff"):
        if isinstance(width := getattr(config, name, None), int):
            return width
    return 4 * frozen.geometry.hidden_size


def _available() -> int:
    """What the machine could give without swapping; where it does not say, all that it has."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _allowed() -> int:
    """What a container may still take."""
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    text = limit.read_text().strip() if limit.is_file() else "max"
    if not text.isdigit():
        return 2**63
    return max(0, int(text) - (int(used.read_text()) if used.is_file() else 0))
