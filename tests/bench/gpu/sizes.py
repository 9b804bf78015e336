"""How much of everything: what a GPU is measured with, and so little that a CPU runs all of it in seconds."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from tests.bench.gpu import machine
from tests.bench.shapes import GPT2_MEDIUM, LLAMA2_7B, QWEN3_600M, Shape
from tests.bench.workload import W, Workload
from tests.models import ENCODER_DECODERS, FAMILIES


@dataclass(frozen=True)
class Decoding:
    """A model, the rows at which its share of the ideal has a goal, and the goal."""

    shape: Shape
    rows: int
    share: float


@dataclass(frozen=True)
class Size:
    """`rows`, `virtual_tokens` and `distinct`: fewer and more of each. `own`: tokens of a row while it is measured.

    A rate is the median of `windows` of `steps` steps each. `families`, `pairs` and `oracles` are checked.
    """

    families: tuple[str, ...] = tuple(FAMILIES)
    pairs: tuple[str, ...] = tuple(ENCODER_DECODERS)
    oracles: tuple[Shape, ...] = (GPT2_MEDIUM, QWEN3_600M)
    fuzzed: int = 24
    decoding: tuple[Decoding, ...] = (
        *(Decoding(LLAMA2_7B, 64, 0.80), Decoding(GPT2_MEDIUM, 256, 0.75), Decoding(QWEN3_600M, 256, 0.70)),
    )
    dtype: torch.dtype = torch.bfloat16
    rows: tuple[int, int] = (64, 256)
    virtual_tokens: tuple[int, int] = (20, 2048)
    distinct: tuple[int, int] = (8, 64)
    own: int = 256
    warm: int = 8
    steps: int = 8
    windows: int = 3
    prefill_tokens: int = 8192
    copied_bytes: int = 4 << 30
    contests: tuple[Shape, ...] = (QWEN3_600M, LLAMA2_7B)
    workload: Workload = W
    rounds: int = 2
    switched: int = 2  # requests of the workload that PEFT gets one after another, and adapters that it gets grouped
    trained: Shape = GPT2_MEDIUM
    users: int = 32
    trained_virtual_tokens: int = 10
    trained_tokens: int = 128
    training_rounds: int = 3


_GPT2 = GPT2_MEDIUM.changed(n_embd=64, n_layer=2, n_head=4, n_positions=160, vocab_size=500)
_GROUPED = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_QWEN3 = QWEN3_600M.changed(**_GROUPED, num_key_value_heads=2, head_dim=16, vocab_size=500)
_LLAMA = LLAMA2_7B.changed(**_GROUPED, num_key_value_heads=4, vocab_size=500)
TINY = Size(
    families=("gpt2", "llama"),
    pairs=("bart",),
    oracles=(_QWEN3,),
    fuzzed=4,
    decoding=(Decoding(_LLAMA, 4, 0.80), Decoding(_GPT2, 6, 0.75), Decoding(_QWEN3, 6, 0.70)),
    rows=(4, 6),
    virtual_tokens=(5, 150),
    distinct=(2, 4),
    own=24,
    warm=2,
    steps=2,
    windows=2,
    prefill_tokens=128,
    copied_bytes=1 << 20,
    contests=(_QWEN3,),
    workload=Workload(requests=6, prefixes=3, virtual_tokens=5, prompt_tokens=(4, 12), new_tokens=6),
    rounds=1,
    trained=_GPT2,
    users=4,
    trained_virtual_tokens=4,
    trained_tokens=12,
    training_rounds=1,
)


@dataclass(frozen=True)
class Setup:
    """What every piece is given."""

    size: Size
    device: str

    @functools.cached_property
    def copy_rate(self) -> float:
        """Bytes a second that this device reads and writes, together, when it copies."""
        return machine.copy_rate(self.device, self.size.copied_bytes)
