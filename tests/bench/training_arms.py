"""The contestants of section `training`: each takes steps of AdamW on a frozen model's prefixes, or on all of it.

Dropout is off in every arm, every prefix starts as the same numbers, and only what is tuned is in an optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import PreTrainedModel

from prefix_store.geometry import ModelGeometry
from prefix_store.model.apply import PrefixRows
from prefix_store.model.frozen import measure
from prefix_store.prefix import Window
from tests.bench.shapes import Shape
from trainer import forward, training_model
from trainer.data import Example
from trainer.forward import Group
from trainer.training_model import TrainingModel

OURS, HALF = "antefix", "antefix, bfloat16"
PEFT, FULL = "PEFT prefix tuning", "full fine-tuning"


@dataclass(frozen=True)
class Setup:
    """What every arm is given; each user has a prefix of `virtual_tokens`."""

    shape: Shape
    virtual_tokens: int
    users: int
    learning_rate: float
    device: str = "cpu"

    def start(self, geometry: ModelGeometry, user: int) -> torch.Tensor:
        """`[P, 2 L Hkv D]`, drawn as PEFT draws them, in its layout."""
        generator = torch.Generator().manual_seed(100 + user)
        return torch.randn(self.virtual_tokens, geometry.kv_numbers_per_token, generator=generator)

    def start_kv(self, geometry: ModelGeometry, user: int) -> torch.Tensor:
        """The same as `[L, 2, Hkv, P, D]`."""
        flat = self.start(geometry, user).view(self.virtual_tokens, *geometry.kv_shape)
        return flat.permute(1, 2, 3, 0, 4).contiguous().to(self.device)


class Arm(Protocol):
    """`step` is what gets timed: one step for every user, of his own examples; losses in nats a token, before it."""

    name: str

    def step(self, batches: Sequence[Sequence[Example]]) -> list[float]: ...

    def state_bytes(self) -> int:
        """Of what is tuned, its gradients and what the optimiser keeps."""


class Ours:
    """All users in one pass forward and one backward."""

    def __init__(self, setup: Setup, dtype: torch.dtype = torch.float32) -> None:
        self.name = OURS if dtype is torch.float32 else HALF
        frozen = training_model.attach(setup.shape.frozen(dtype, device=setup.device))
        if not isinstance(frozen, TrainingModel):
            raise RuntimeError("the model would be trained the plain way")
        self.frozen = frozen
        self.tuned = [torch.nn.Parameter(setup.start_kv(frozen.geometry, user)) for user in range(setup.users)]
        self._optimisers = [optimiser([kv], setup) for kv in self.tuned]

    def step(self, batches: Sequence[Sequence[Example]]) -> list[float]:
        losses = self._losses(batches, self.tuned)
        for used in self._optimisers:
            used.zero_grad()
        torch.stack(losses).sum().backward()
        for used in self._optimisers:
            used.step()
        return [loss.item() for loss in losses]

    @torch.no_grad()
    def losses(self, batches: Sequence[Sequence[Example]], prefixes: Sequence[torch.Tensor | None]) -> list[float]:
        """With any prefixes; None is the bare model."""
        return [loss.item() for loss in self._losses(batches, prefixes)]

    def state_bytes(self) -> int:
        return sum(map(held, self._optimisers))

    def _losses(
        self, batches: Sequence[Sequence[Example]], prefixes: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        groups = [
            Group(PrefixRows.shared(kv, len(batch), kv.shape[3], Window.SLIDES) if kv is not None else None, batch)
            for kv, batch in zip(prefixes, batches, strict=True)
        ]
        found = forward.losses(self.frozen, groups)
        return [nats / len(group.labels) for nats, group in zip(found, groups, strict=True)]


class Peft:
    """A PeftModel for each user over one base model, one step after another."""

    name = PEFT

    def __init__(self, setup: Setup, dtype: torch.dtype = torch.float32) -> None:
        base = setup.shape.model("sdpa", dtype, device=setup.device)
        geometry = measure(base)
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=setup.virtual_tokens)
        self._models = [get_peft_model(base, config).to(setup.device).eval() for _ in range(setup.users)]
        self._optimisers = []
        for user, model in enumerate(self._models):
            weight = model.prompt_encoder["default"].embedding.weight
            weight.data.copy_(setup.start(geometry, user))
            self._optimisers.append(optimiser([weight], setup))

    def step(self, batches: Sequence[Sequence[Example]]) -> list[float]:
        return [
            step(model, used, batch) for model, used, batch in zip(self._models, self._optimisers, batches, strict=True)
        ]

    def state_bytes(self) -> int:
        return sum(map(held, self._optimisers))


class Full:
    """Every parameter of the model, no prefix; for the first user alone."""

    name = FULL

    def __init__(self, setup: Setup) -> None:
        self._model = setup.shape.model("sdpa").requires_grad_(True)
        self._optimiser = optimiser(list(self._model.parameters()), setup)

    def step(self, batches: Sequence[Sequence[Example]]) -> list[float]:
        (batch,) = batches
        return [step(self._model, self._optimiser, batch)]

    def state_bytes(self) -> int:
        return held(self._optimiser)


ARMS = {OURS: Ours, HALF: lambda setup: Ours(setup, torch.bfloat16), PEFT: Peft, FULL: Full}


def step(model: PreTrainedModel | PeftModel, used: torch.optim.Optimizer, batch: Sequence[Example]) -> float:
    """What transformers' users write: a padded batch, the model's own loss, a step."""
    width = max(len(example.ids) for example in batch)
    ids, mask = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(batch):
        length, targets = len(example.ids), list(example.targets)
        ids[row, :length], mask[row, :length] = torch.tensor(example.ids), 1
        labels[row, targets] = ids[row, targets]
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    loss = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).loss
    used.zero_grad()
    loss.backward()
    used.step()
    return float(loss.detach())


def optimiser(parameters: Sequence[torch.nn.Parameter], setup: Setup) -> torch.optim.Optimizer:
    """The fastest AdamW there is, the same for all."""
    return torch.optim.AdamW(parameters, lr=setup.learning_rate, weight_decay=0.0, fused=True)


def held(used: torch.optim.Optimizer) -> int:
    """Bytes of what an optimiser moves, of the gradients, and of what it remembers; after a step."""
    tuned = [parameter for group in used.param_groups for parameter in group["params"]]
    kept = [value for state in used.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(parameter.nbytes + parameter.grad.nbytes for parameter in tuned) + sum(value.nbytes for value in kept)
