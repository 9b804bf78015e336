"""What training minimises, from the logits that predict completion tokens."""

from __future__ import annotations

import torch


def nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log p of `labels` `[C]` under `logits` `[C, V]`, summed, in float32."""
    return torch.nn.functional.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")
