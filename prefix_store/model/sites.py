"""Which stack and layer each attention module of a model stands in.

An encoder-decoder model of transformers has one class for its three attentions, two of them in every layer of the
decoder, and in some families no layer index in the encoder: so a module cannot tell by itself. A short run can: within
a stack the layers come in order, and who is given `key_value_states` looks at the source.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from prefix_store.geometry import Stack

_MARK = "antefix_site"


@dataclass(frozen=True)
class Site:
    """One attention's place."""

    stack: Stack
    layer: int


def of(module: torch.nn.Module) -> Site:
    """What `mark` found. Decoder-only models are not marked: their attentions know their layers."""
    site: Site | None = vars(module).get(_MARK)
    return site or Site(Stack.SELF, module.layer_idx)  # type: ignore[arg-type]


def stack_of(module: torch.nn.Module) -> Stack:
    """The stack alone, which needs no layer: older families have no index of it."""
    site: Site | None = vars(module).get(_MARK)
    return site.stack if site is not None else Stack.SELF


def mark(model: PreTrainedModel) -> None:
    """Notes its site on every attention module of an encoder-decoder model. Copies of the model keep it."""
    encoder = set(model.get_encoder().modules())
    seen: Counter[Stack] = Counter()

    def note(module: torch.nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        is_cross = kwargs.get("key_value_states") is not None
        stack = Stack.ENCODER if module in encoder else Stack.CROSS if is_cross else Stack.SELF
        setattr(module, _MARK, Site(stack, seen[stack]))
        seen[stack] += 1

    attentions = [module for module in model.modules() if hasattr(module, "layer_idx")]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in attentions]
    probe = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            model(input_ids=probe, decoder_input_ids=probe, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
