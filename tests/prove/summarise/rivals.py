"""What else of a BART can be tuned: everything, its top layer, and PEFT's prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PrefixTuningConfig, TaskType, get_peft_model
from torch.nn import functional

from tests.prove.paper.baselines import Baseline
from trainer.data import Example, collate, collate_sources


def target_loss(model: Any, examples: Sequence[Example]) -> torch.Tensor:
    """Mean -log p of the answers' tokens, of an encoder-decoder model."""
    (source, real_mask), batch = collate_sources(examples), collate(examples)
    logits = model(input_ids=source, attention_mask=real_mask.long(), decoder_input_ids=batch.ids).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten())


def rivals(virtual_tokens: int) -> dict[str, Baseline]:
    """By name, with the learning rates that are tried."""

    def peft_prefix(model: Any) -> Any:
        torch.manual_seed(0)
        config = PrefixTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=virtual_tokens)
        return get_peft_model(model, config)

    return {
        "fine-tuning": Baseline(_all, (3e-4, 1e-3, 3e-3)),
        "top layer": Baseline(_top, (1e-3, 3e-3, 1e-2)),
        "PEFT prefix": Baseline(peft_prefix, (2e-2, 8e-2, 3e-1)),
    }


def _all(model: Any) -> Any:
    return model.requires_grad_(True)


def _top(model: Any) -> Any:
    model.model.decoder.layers[-1].requires_grad_(True)
    return model
