"""Training is PEFT's own: its model and torch's Adam on its parameters give the same losses, gradients and prefixes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply
from tests.models import tiny_frozen
from trainer import schedule
from trainer.data import Example, collate, shuffled_batches
from trainer.loop import fit
from trainer.methods import METHODS
from trainer.methods.base import KVMethod
from trainer.progress import Progress
from trainer.tuning import CLIP

P, MIDDLE, STEPS, RATE = 5, 24, 3, 0.3
EXAMPLES = [Example(tuple(range(first, first + length)), 3) for first, length in ((2, 9), (30, 6), (60, 12), (90, 7))]
CONFIGS: dict[str, Callable[[], Any]] = {
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
    "prefix_mlp": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=MIDDLE
    ),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
    "prompt_mlp": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        encoder_hidden_size=MIDDLE,
        encoder_reparameterization_type="MLP",
    ),
    "prompt_lstm": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        encoder_hidden_size=MIDDLE,
        encoder_reparameterization_type="LSTM",
    ),
}


@dataclass(frozen=True)
class Weight:
    """A tensor that is tuned, as PEFT lays it out: where it starts, its unit, and how ours is turned into it."""

    start: torch.Tensor
    unit: torch.Tensor
    delta: torch.nn.Parameter
    flat: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor

    def gradient(self) -> torch.Tensor:
        """After the clip, in PEFT's numbers, which are not measured in units."""
        return self.flat(self.delta.grad) / self.unit

    def value(self) -> torch.Tensor:
        return self.start + self.unit * self.flat(self.delta.detach())


def flat(kv: torch.Tensor) -> torch.Tensor:
    """`[L, 2, Hkv, P, D]` as `[P, L * 2 * Hkv * D]`."""
    return kv.permute(3, 0, 1, 2, 4).flatten(1)


def weights_of(name: str, method: KVMethod) -> list[Weight]:
    """In the order of PEFT's parameters."""
    if name == "prefix":
        kv = method.kv().detach()
        unit = kv.std(dim=(2, 3, 4), keepdim=True).expand_as(kv)
        return [Weight(flat(kv), flat(unit), method.delta, flat)]
    if name == "prompt":
        embeds = method.embeds().detach()
        return [Weight(embeds, embeds.std().expand_as(embeds), method.delta)]
    tuned = [method.encoder.embeddings, *method.encoder.weights.values()]
    return [Weight(one.start, torch.as_tensor(one.unit).expand_as(one.start), one.delta) for one in tuned]


Told = tuple[float, list[torch.Tensor], list[torch.Tensor]]  # loss before the step, gradients, parameters after it


def train_peft(family: str, name: str, weights: list[Weight]) -> list[Told]:
    """PEFT's model, torch's Adam. Gradients and steps are measured in the weights' units, nothing else is ours."""
    model = get_peft_model(tiny_frozen(family).model, CONFIGS[name]()).eval()  # no dropout
    parameters, told = list(model.prompt_encoder["default"].parameters()), []
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight.start)
    optimiser = torch.optim.Adam(parameters)
    batches = islice(shuffled_batches(EXAMPLES, 2, seed=0), STEPS)
    for step, batch in enumerate(map(collate, batches), start=1):
        optimiser.zero_grad()
        loss = model(input_ids=batch.ids, attention_mask=batch.real_mask.long(), labels=batch.labels).loss
        loss.backward()
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.grad *= weight.unit
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        gradients = [parameter.grad / weight.unit for parameter, weight in zip(parameters, weights, strict=True)]
        optimiser.param_groups[0]["lr"] = RATE * schedule.share("linear", step, STEPS, 0.05)
        optimiser.step()
        for parameter, weight, old in zip(parameters, weights, before, strict=True):
            parameter.data.copy_(old + weight.unit * (parameter - old))
        told.append((loss.item(), gradients, [parameter.detach().clone() for parameter in parameters]))
    return told


def differences(ours: list[Told], theirs: list[Told], weights: list[Weight]) -> tuple[float, float, float]:
    """The largest of any loss, of any gradient as a share of its tensor's largest, and of any move, in units."""
    loss = gradient = moved = 0.0
    for (loss1, gradients1, after1), (loss2, gradients2, after2) in zip(ours, theirs, strict=True):
        loss = max(loss, abs(loss1 - loss2))
        for one, two in zip(gradients1, gradients2, strict=True):
            gradient = max(gradient, float((one - two).abs().max() / two.abs().max()))
        for one, two, weight in zip(after1, after2, weights, strict=True):
            moved = max(moved, float(((one - two) / weight.unit).square().mean().sqrt()))
    return loss, gradient, moved


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_gradients_and_steps_are_pefts(name, family):
    frozen = apply.attach(tiny_frozen(family))
    spec = TrainingSpec(
        "0" * 64, len(EXAMPLES), method=name, virtual_tokens=P, steps=STEPS, batch_size=2, learning_rate=RATE,
        bottleneck=MIDDLE, frozen_tokens=0,
    )  # fmt: skip
    method = METHODS[name](frozen, spec, count(40))
    weights, ours = weights_of(name, method), []

    def tell(progress: Progress) -> None:
        gradients, after = [weight.gradient() for weight in weights], [weight.value() for weight in weights]
        ours.append((progress.train_loss, gradients, after))

    fit(frozen, method, EXAMPLES, spec, on_progress=tell)
    # observed 2e-5, and 3e-4 where rounding goes through two layers of states
    most = 1e-3 if name == "prompt_lstm" else 1e-4
    assert max(differences(ours, train_peft(family, name, weights), weights)) < most
    wrong = [replace(weight, start=weight.start.flip(-1)) for weight in weights]
    assert min(differences(ours, train_peft(family, name, wrong), weights)) > 0.01
