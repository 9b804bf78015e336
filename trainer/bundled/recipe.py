"""How the bundled model is pretrained: every number that decides the result, and how long a run is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.bundled import induction
from trainer.bundled.corpus import echoes, shuffled_documents

SIZE = {
    "hidden_size": 320,
    "num_hidden_layers": 4,  # few and wide: on a CPU, attention costs more than its share of the arithmetic
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "intermediate_size": 880,
}
# (share of the run after which it holds, window): short windows are cheap, long ones teach the far positions.
WINDOWS = ((0.0, 256), (0.5, 512), (0.9, 1024))
# (share of the run, share of the peak rate), straight lines between.
RATES = ((0.0, 1.0), (0.3, 1.0), (1.0, 0.01))


@dataclass(frozen=True)
class Recipe:
    """Every number that decides the result, apart from the length of the run."""

    vocabulary: int = 6144
    context: int = 1024
    size: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(SIZE))
    windows: tuple[tuple[float, int], ...] = WINDOWS
    paragraphs: int = 12
    batch_tokens: int = 4096
    matrix_rate: float = 0.005
    embedding_rate: float = 8e-3
    norm_rate: float = 1e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup_steps: int = 50
    rates: tuple[tuple[float, float], ...] = RATES
    seed: int = 1
    bf16: bool = True
    compiled: bool = True

    def fingerprint(self, corpus: Path) -> str:
        """Names a checkpoint: another recipe, another start or another text never resumes this one."""
        numbers = [dataclasses.asdict(self), induction.NUMBERS]
        digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode())
        documents = shuffled_documents(corpus, self.paragraphs, self.seed)
        for document in (*documents, *echoes(documents, self.seed)):
            digest.update(document.encode())
        return digest.hexdigest()[:12]

    def rate(self, progress: float, step: int) -> float:
        """Share of the peak rate: warm-up in steps, times what the table says."""
        shares, rates = zip(*self.rates, strict=True)
        return min(1.0, (step + 1) / self.warmup_steps) * float(np.interp(progress, shares, rates))

    def window(self, progress: float) -> int:
        """Tokens in a training window at this point of the run."""
        return [window for start, window in self.windows if progress >= start][-1]


@dataclass(frozen=True)
class Budget:
    """Where a run ends: at `steps` if given, else after `minutes` of training over all its restarts."""

    minutes: float
    steps: int | None = None

    def progress(self, step: int, elapsed: float) -> float:
        """0 at the start, 1 at the end."""
        return step / self.steps if self.steps is not None else elapsed / (60 * self.minutes)
