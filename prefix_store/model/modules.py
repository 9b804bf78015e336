"""Modules of a frozen model, changed for equal ones that are faster."""

from __future__ import annotations

from collections.abc import Callable

import torch

_PLAIN = "plain"

# Where a module was, by its parent and its name there, and what it was: for putting it back.
Replaced = tuple[torch.nn.Module, str, torch.nn.Module]


def replace(model: torch.nn.Module, make: Callable[[torch.nn.Module], torch.nn.Module | None]) -> list[Replaced]:
    """Puts what `make` gives in the place of every module of the model for which it gives something."""
    replaced: list[Replaced] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            made = make(child)
            if made is not None:
                setattr(parent, name, made)
                replaced.append((parent, name, child))
    return replaced


def keep_plain(fast: torch.nn.Module, plain: torch.nn.Module) -> None:
    """Notes what a module stands for, without making that one of its parts."""
    fast.__dict__[_PLAIN] = plain


def plain_of(module: torch.nn.Module) -> torch.nn.Module | None:
    """What the module stands for; None where it stands for itself."""
    return module.__dict__.get(_PLAIN)


def make_plain(model: torch.nn.Module) -> None:
    """Puts back what other modules stand for, and every module's own forward."""
    replace(model, plain_of)
    for module in model.modules():
        vars(module).pop("forward", None)
