"""Activations in one pass over memory: transformers writes the older kinds of GELU out in seven."""

from __future__ import annotations

import torch
from transformers.activations import FastGELUActivation, NewGELUActivation

# Both are 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
TANH_GELU = (NewGELUActivation, FastGELUActivation)


def fuse(model: torch.nn.Module) -> int:
    """Replaces the model's activations by equal ones that are one kernel; returns how many."""
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in TANH_GELU:
                setattr(parent, name, torch.nn.GELU("tanh"))
                replaced += 1
    return replaced
