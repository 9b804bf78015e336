"""Reparametrisation: virtual tokens as what a small network makes of free embeddings. The network is not kept.

Embeddings and network are drawn at random, but for the network's last layer, which is then fitted, so that training
starts at a given tensor. Li & Liang's activation fit finds such a network by 500 steps of Adam on the mean squared
error. The last layer is linear, so the least of that error has a closed form, and of all layers that reach it the one
nearest to the drawn one is taken. The error is 0 where the layer has at least as many inputs as there are virtual
tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.func import functional_call

from trainer.methods.tuned import Tuned


class Encoder:
    """`P` free embeddings `[P, width]` through a network to `[P, n]`, all of it tuned.

    `body` makes the network up to its last layer, from torch's own generator. `target` `[P, n]` is the output at the
    start; `spread`, `[n]` or one for all, is what is a usual number there.

    Weights are tuned in units of their own spread when they were drawn, those of the last layer times the target's;
    the numbers of an embedding in units of 1 / sqrt(width), by which it moves as a whole by about the learning rate.
    """

    def __init__(
        self,
        body: Callable[[], torch.nn.Module],
        width: int,
        target: torch.Tensor,
        spread: torch.Tensor,
        seed: int,
    ) -> None:
        virtual_tokens, numbers = target.shape
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            embeddings, first = torch.randn(virtual_tokens, width), body()
            features = first(embeddings).shape[1]
            self._network = torch.nn.Sequential(first, torch.nn.Linear(features, numbers))
        self._network.to(target.device).requires_grad_(False)
        self.embeddings = Tuned(embeddings.to(target.device), width**-0.5)
        units = {name: weight.square().mean().sqrt() for name, weight in self._network.named_parameters()}
        _fit(self._network, self.embeddings.start, target, spread.expand(numbers))
        units["1.weight"], units["1.bias"] = units["1.weight"] * spread[..., None], units["1.bias"] * spread
        self.weights = {name: Tuned(weight.detach(), units[name]) for name, weight in self._network.named_parameters()}

    def parameters(self) -> list[torch.nn.Parameter]:
        """The embeddings' delta and each weight's."""
        return [tuned.delta for tuned in (self.embeddings, *self.weights.values())]

    def output(self) -> torch.Tensor:
        """What the network makes of the embeddings now, `[P, n]`, differentiable in the parameters."""
        weights = {name: tuned.value() for name, tuned in self.weights.items()}
        result: torch.Tensor = functional_call(self._network, weights, (self.embeddings.value(),))
        return result


def size(body: Callable[[], torch.nn.Module], virtual_tokens: int, width: int, numbers: int) -> int:
    """How many numbers an Encoder to `[virtual_tokens, numbers]` tunes, none of which is made."""
    with torch.device("meta"):
        embeddings, first = torch.empty(virtual_tokens, width), body()
        features: int = first(embeddings).shape[1]
    weights = sum(weight.numel() for weight in first.parameters())
    return embeddings.numel() + weights + (features + 1) * numbers


@torch.no_grad()
def _fit(network: torch.nn.Sequential, embeddings: torch.Tensor, target: torch.Tensor, spread: torch.Tensor) -> None:
    """The least change of the last layer's weights for which the squared error of the output is least."""
    body, last = network
    assert isinstance(last, torch.nn.Linear)
    last.weight.mul_(spread[:, None])
    last.bias.mul_(spread)
    features = body(embeddings)
    last.weight.add_((torch.linalg.pinv(features) @ (target - last(features))).T)
