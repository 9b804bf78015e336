"""Activations in one pass over memory: transformers writes the older kinds of GELU out in seven."""

from __future__ import annotations

import torch
from transformers.activations import FastGELUActivation, NewGELUActivation

from prefix_store.model.modules import replace

# Both are 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
TANH_GELU = (NewGELUActivation, FastGELUActivation)


def fuse(model: torch.nn.Module) -> int:
    """Replaces the model's activations by equal ones that are one kernel; returns how many."""
    return len(replace(model, lambda layer: torch.nn.GELU("tanh") if type(layer) in TANH_GELU else None))
