"""What a job takes in memory while it trains, and how much there is for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from prefix_store.jobs import BUILT_IN_METHODS, METHODS_WITH, TrainingSpec
from prefix_store.model.frozen import FrozenModel
from trainer.data import Example, TrainingData

# Of what is free when the worker starts. The server beside it, and the system's own caches, want the rest.
SHARE = 0.5
# Numbers that a layer keeps for the backward, for each token: so many times its hidden size, its heads' outputs, its
# keys and values, and its feed-forward's width; and so many for each head and each token that is attended to.
HIDDEN, HEADS, KV, FORWARD, SCORES = 8, 3, 6, 4, 4
LOGITS = 4  # for each token and word of the vocabulary
PREFIX = 4  # of a prefix: as the parameters make it, its gradient, the best so far, and one on its way
# Copies of all parameters: where they began, what has been added, both together, their gradient, two moments, and what
# an operation on them takes; observed 7.0 to 7.7. And how many more while they are written, which one run does at a
# time; observed 7 to 9.
STATE, SAVING = 8, 8
BYTES = 4  # float32
MB = 1 << 20


class TooLarge(Exception):
    """There is less memory than what a job keeps beside all that its steps take."""


def of_state(tuned: int) -> int:
    """Bytes that a run keeps of a method which tunes so many numbers, whatever its examples are."""
    return BYTES * STATE * tuned


def check_state(spec: TrainingSpec, tuned: int, budget: int) -> None:
    """Raises TooLarge where what a run keeps, and has to save, is more than there is for all runs together."""
    need = of_state(tuned) + BYTES * SAVING * tuned
    if need <= budget:
        return
    able = [
        f"a smaller {name}"
        for name in ("bottleneck", "virtual_tokens")
        if spec.method in METHODS_WITH[name] or spec.method not in BUILT_IN_METHODS
    ]
    raise TooLarge(
        f"method {spec.method} tunes {tuned:,} numbers here, which with their gradient and optimiser take "
        f"{-(-need // MB):,} MB, and this worker has {budget // MB:,} MB for training; "
        f"{' or '.join([*able, 'another method'])} takes less"
    )


def of_run(frozen: FrozenModel, parts: TrainingData, tuned: int) -> int:
    """Bytes that a run takes at most, about: what it keeps, and a step or a part of a validation.

    `tuned`: how many numbers its method tunes.
    """
    spec = parts.spec
    kept = of_state(tuned) + sum(_taught(example) for example in (*parts.train, *parts.valid))
    step = of_step(frozen, parts.train, min(spec.batch_size, len(parts.train)), spec.virtual_tokens)
    if not parts.valid:
        return kept + step
    rows = min(spec.batch_size, len(parts.valid))
    return kept + max(step, of_validation(frozen, parts.valid, rows, spec.virtual_tokens))


def _taught(example: Example) -> int:
    """Bytes of what a teacher has said of it."""
    teacher = example.teacher
    return 0 if teacher is None else teacher.ids.nbytes + teacher.probabilities.nbytes


def of_step(frozen: FrozenModel, examples: Sequence[Example], rows: int, virtual_tokens: int) -> int:
    """Bytes that a forward and backward over `rows` of the longest examples behind a prefix take at most, about.

    A plain count of what the reference's layers keep, attention written out in full; a forward that keeps less takes
    less. A layer beside an encoder counts for two, for its second attention.
    """
    encoder = frozen.geometry.encoder
    depth = frozen.geometry.layers, encoder.layers if encoder is not None else 0
    return _of_pass(frozen, examples, rows, virtual_tokens, depth)


def of_validation(frozen: FrozenModel, examples: Sequence[Example], rows: int, virtual_tokens: int) -> int:
    """The same of a forward alone: what a layer keeps is gone before the next."""
    return _of_pass(frozen, examples, rows, virtual_tokens, (1, 1))


def _of_pass(
    frozen: FrozenModel, examples: Sequence[Example], rows: int, virtual_tokens: int, depth: tuple[int, int]
) -> int:
    """`depth`: of how many layers of the decoder, and of the encoder, something is there at the same time."""
    geometry, encoder = frozen.geometry, frozen.geometry.encoder
    tokens, source = max(len(example.ids) for example in examples), max(len(example.source) for example in examples)
    layers = depth[0] * tokens * _layer(frozen, geometry.kv_heads, virtual_tokens + tokens)
    prefixes = geometry.kv_numbers_per_token * virtual_tokens
    if encoder is not None:
        layers += depth[0] * tokens * _layer(frozen, geometry.kv_heads, virtual_tokens + source)
        layers += depth[1] * source * _layer(frozen, encoder.heads, virtual_tokens + source)
        prefixes = 2 * prefixes + 2 * encoder.layers * encoder.heads * encoder.head_dim * virtual_tokens
    numbers = rows * (layers + tokens * LOGITS * frozen.vocabulary_size + prefixes)
    return BYTES * (numbers + PREFIX * prefixes)


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
