"""What else of a model can be tuned: everything, its last layer, adapters, LoRA, and PEFT's prefix, in plain torch.

All arms train alike: AdamW without decay, a warm-up of 5 % and then a line to 0, the gradient's norm clipped at 1, the
loss a mean over completion tokens, the best of ten looks at the dev rows kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from torch import nn
from torch.nn import functional

from trainer.data import Example, batches, collate, shuffled_batches

WARMUP, LOOKS, BATCH, WRITTEN = 0.05, 10, 8, 32
Loss = Callable[[Any, Sequence[Example]], torch.Tensor]


@dataclass(frozen=True)
class Baseline:
    """`prepare` turns a model, all of whose parameters are frozen, into one of which something can be trained."""

    prepare: Callable[[Any], Any]
    rates: tuple[float, ...]


class Adapter(nn.Module):
    """Houlsby et al. (2019): y = f(x), then y + W2 gelu(W1 y); W2 starts at zero, so that nothing changes at first."""

    def __init__(self, inner: nn.Module, width: int, size: int) -> None:
        super().__init__()
        self.inner, self.down, self.up = inner, nn.Linear(width, size), nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., width]` to the same."""
        y: torch.Tensor = self.inner(x)
        return y + self.up(functional.gelu(self.down(y)))


def causal_loss(model: Any, examples: Sequence[Example]) -> torch.Tensor:
    """Mean -log p of the completions' tokens, of a decoder-only model."""
    batch = collate(examples)
    logits = model(input_ids=batch.ids, attention_mask=batch.real_mask.long()).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten())


def train(
    model: Any,
    examples: Sequence[Example],
    dev: Sequence[Example],
    *,
    rate: float,
    steps: int,
    seed: int,
    loss_of: Loss = causal_loss,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Tunes what can be tuned, leaves the best state by dev loss in the model, and says what it took by `clock`."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    best, kept = nats(model, dev, loss_of), _copies(parameters)
    stream, seconds = shuffled_batches(examples, BATCH, seed), 0.0
    for step in range(1, steps + 1):
        begun = clock()
        loss = loss_of(model, next(stream))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        warmup = max(1, round(WARMUP * steps))
        for group in optimiser.param_groups:
            group["lr"] = rate * min(step / warmup, (steps - step + 1) / (steps - warmup + 1))
        optimiser.step()
        seconds += clock() - begun
        if step % -(-steps // LOOKS) == 0 or step == steps:
            found = nats(model, dev, loss_of)
            if found < best:
                best, kept = found, _copies(parameters)
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return {"loss": best, "step_seconds": seconds / steps, "trainable": sum(p.numel() for p in parameters)}


@torch.no_grad()
def nats(model: Any, examples: Sequence[Example], loss_of: Loss = causal_loss) -> float:
    """Mean -log p of the completions' tokens."""
    tokens = [sum(len(example.targets) for example in batch) for batch in batches(examples, WRITTEN)]
    losses = [float(loss_of(model, batch)) for batch in batches(examples, WRITTEN)]
    return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)


@torch.no_grad()
def write(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], longest: int) -> list[str]:
    """Greedy answers, in batches padded on the left."""
    answers = []
    for start in range(0, len(prompts), WRITTEN):
        rows = prompts[start : start + WRITTEN]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), tokenizer.eos_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(rows):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        found = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=longest,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        answers += tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
    return answers


def _copies(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _all(model: Any) -> Any:
    return model.requires_grad_(True)


def _top(model: Any, layers: int) -> Any:
    for layer in model.model.layers[-layers:]:
        layer.requires_grad_(True)
    model.model.norm.requires_grad_(True)
    return model


def _adapters(model: Any, size: int) -> Any:
    torch.manual_seed(0)
    width = model.config.hidden_size
    for layer in model.model.layers:
        layer.self_attn.o_proj = Adapter(layer.self_attn.o_proj, width, size)
        layer.mlp.down_proj = Adapter(layer.mlp.down_proj, width, size)
        for adapter in (layer.self_attn.o_proj, layer.mlp.down_proj):
            adapter.down.requires_grad_(True)
            adapter.up.requires_grad_(True)
    return model


def _lora(model: Any, rank: int) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
    return get_peft_model(model, config)


def _peft_prefix(model: Any, virtual_tokens: int, *, projection: bool) -> Any:
    torch.manual_seed(0)
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=virtual_tokens,
        prefix_projection=projection,
        encoder_hidden_size=512 if projection else None,  # type: ignore[arg-type]
    )
    return get_peft_model(model, config)


def baselines(virtual_tokens: int) -> dict[str, Baseline]:
    """The paper's rivals; LoRA has as many numbers as a prefix of so many virtual tokens."""
    return {
        "fine-tuning": Baseline(_all, (3e-4, 1e-3, 3e-3)),
        "last layer": Baseline(partial(_top, layers=1), (1e-3, 3e-3, 1e-2)),
        "adapters 3 %": Baseline(partial(_adapters, size=40), (1e-3, 3e-3, 1e-2)),
        "adapters 0.1 %": Baseline(partial(_adapters, size=1), (3e-3, 1e-2, 3e-2)),
        "LoRA": Baseline(partial(_lora, rank=virtual_tokens // 2), (3e-3, 1e-2, 3e-2)),
        "PEFT prefix": Baseline(
            partial(_peft_prefix, virtual_tokens=virtual_tokens, projection=False), (2e-2, 8e-2, 3e-1)
        ),
        "PEFT prefix, MLP": Baseline(
            partial(_peft_prefix, virtual_tokens=virtual_tokens, projection=True), (1e-3, 3e-3, 1e-2)
        ),
    }
