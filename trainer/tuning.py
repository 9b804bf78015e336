"""One prefix on its way: its parameters, its optimiser, its place in the data, and the best that it has been.

Knows no jobs, no store, and nothing of the prefixes that share a forward with it. All that a run is at a step goes into
bytes and comes back from them: a run that was cut off goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from prefix_store.errors import ModelUnsupported
from prefix_store.jobs import TrainingSpec
from prefix_store.tensors import PrefixTensors
from trainer import schedule
from trainer.data import Example, shuffled_batches
from trainer.forward import Group
from trainer.methods.base import TuningMethod

VALIDATIONS = 10  # a run, besides the one at its start
CLIP = 1.0
STATE_KEY, STATE_FORMAT = "antefix_run", 1


@dataclass(frozen=True)
class Fit:
    """The prefix that a run keeps: its best by validation, or its last where nothing validates.

    `bare_loss` is that of the model without a prefix, where it was measured.
    """

    tensors: PrefixTensors
    step: int
    valid_loss: float | None
    start_loss: float | None
    bare_loss: float | None = None

    @property
    def improves(self) -> bool:
        """Whether it is better than no prefix and than what it started from, or nobody knows."""
        if self.valid_loss is None:
            return True
        return self.step > 0 and (self.bare_loss is None or self.valid_loss < self.bare_loss)


@dataclass
class _Losses:
    """What validation has said so far: `judged` at which step last, `worse` how often since the best."""

    bare: float | None = None
    start: float | None = None
    best: float | None = None
    best_step: int = 0
    judged: int = -1
    worse: int = 0


class StateMismatch(Exception):
    """Saved bytes that are no state of this run."""


class Tuning:
    """A run of `spec.steps` steps of AdamW. Equal seeds give equal bits, cut off and taken up again or not.

    `validates`: someone will answer `judge` whenever a validation is `due`, at the start first of all. Whoever steps it
    takes the `group`, sends a loss backward through it, and calls `update`. `source`: the stored prefix that the method
    starts from, if any; it is saved as well, for it may be deleted meanwhile.
    """

    def __init__(
        self,
        method: TuningMethod,
        examples: Sequence[Example],
        spec: TrainingSpec,
        *,
        validates: bool,
        source: PrefixTensors | None = None,
    ) -> None:
        self.method, self.spec, self.validates = method, spec, validates
        self._source = source
        self.step = 0
        self.loss: float | None = None  # of the last step, as it was before it
        self.batch_tokens = 0  # of the last step
        self.tokens = 0  # of all steps
        self._examples = examples
        self._optimiser = torch.optim.AdamW(method.parameters(), weight_decay=spec.weight_decay)
        self._batches = shuffled_batches(examples, spec.batch_size, spec.seed)
        self._batch: list[Example] | None = None  # taken, and not yet learnt from
        self._losses = _Losses()
        self._best: PrefixTensors | None = None

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        spec = self.spec
        return spec.learning_rate * schedule.share(spec.schedule, self.step, spec.steps, spec.warmup)

    @property
    def due(self) -> bool:
        """Whether the prefix as it is now waits for its validation."""
        asked = self.step == 0 or is_due(self.step, self.spec.steps, VALIDATIONS)
        return self.validates and asked and self._losses.judged < self.step

    @property
    def done(self) -> bool:
        """Whether nothing is left to do: all steps are taken, or validation has lost its patience."""
        given_up = 0 < self.spec.patience <= self._losses.worse
        return not self.due and (self.step >= self.spec.steps or given_up)

    @property
    def bare_loss(self) -> float | None:
        """The validation loss without a prefix, once it is known; for whoever steps this to measure."""
        return self._losses.bare

    @bare_loss.setter
    def bare_loss(self, loss: float) -> None:
        self._losses.bare = finite(loss, "validation")

    def group(self) -> Group:
        """The next batch behind the prefix as it is now, its gradients forgotten; the same batch until `update`."""
        if self._batch is None:
            self._batch = next(self._batches)
        self._optimiser.zero_grad()
        return Group(self.method.rows(len(self._batch)), self._batch)

    def update(self, loss: float) -> None:
        """Steps by the gradients that there are, clipped by their own norm; `loss` is what they are of.

        Raises ModelUnsupported where a layer gets no gradient: cut off at the first step, it stays cut off.
        """
        assert self._batch is not None
        if not self._optimiser.state and (lost := self.method.layers_without_gradient()):
            raise ModelUnsupported(f"no gradient reaches the prefix in layers {lost}")
        torch.nn.utils.clip_grad_norm_(self.method.parameters(), CLIP)
        self.step += 1
        for settings in self._optimiser.param_groups:
            settings["lr"] = self.rate
        self._optimiser.step()
        self.batch_tokens = sum(example.tokens for example in self._batch)
        self.tokens += self.batch_tokens
        self._batch, self.loss = None, loss

    def judge(self, loss: float) -> None:
        """Takes the validation loss of the prefix as it is now; the start counts as one that may be kept.

        Raises FloatingPointError unless it is a number.
        """
        losses = self._losses
        finite(loss, "validation")
        losses.judged, losses.worse = self.step, losses.worse + 1
        if losses.start is None:
            losses.start = loss
        if losses.best is None or loss < losses.best:
            losses.best, losses.best_step, losses.worse = loss, self.step, 0
            self._best = self.method.tensors()

    def result(self) -> Fit:
        """What is kept, of what has been so far."""
        if self._best is None:
            return Fit(self.method.tensors(), self.step, None, None)
        losses = self._losses
        return Fit(self._best, losses.best_step, losses.best, losses.start, losses.bare)

    def to_bytes(self, model: str) -> bytes:
        """A safetensors file: parameters, AdamW's moments, the best prefix, and in its header the rest as JSON.

        The place in the data and the state of its random order are one number, the step: the seed gives the order.
        `model` names the frozen model, and `load` wants the same.
        """
        tensors: dict[str, torch.Tensor] = {f"best.{name}": tensor for name, tensor in (self._best or {}).items()}
        tensors |= {f"source.{name}": tensor for name, tensor in (self._source or {}).items()}
        for number, parameter in enumerate(self.method.parameters()):
            tensors[f"parameter.{number}"] = parameter.detach()
            for name, moment in self._optimiser.state.get(parameter, {}).items():
                tensors[f"adam.{number}.{name}"] = moment
        header = {"format": STATE_FORMAT, "model": model, "step": self.step, "loss": self.loss, "tokens": self.tokens}
        text = json.dumps({**header, "losses": asdict(self._losses)})
        # an absent best has no tensor; copies, for a state on the CPU may be a view of what goes on changing
        return save({name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()}, {STATE_KEY: text})

    def load(self, data: bytes, model: str) -> None:
        """Goes on from the bytes, in a run that was just made. Raises StateMismatch, and then the run is as it was."""
        tensors, header = _read(data)
        if (header["format"], header["model"]) != (STATE_FORMAT, model):
            raise StateMismatch("saved by another version, or on another base model")
        parameters = self.method.parameters()
        try:
            saved = [tensors[f"parameter.{number}"] for number in range(len(parameters))]
        except KeyError as error:
            raise StateMismatch(f"saved without {error}") from None
        shapes = [list(parameter.shape) for parameter in parameters]
        if [list(tensor.shape) for tensor in saved] != shapes:
            raise StateMismatch(f"saved with parameters of other shapes than {shapes}")
        with torch.no_grad():
            for parameter, tensor in zip(parameters, saved, strict=True):
                parameter.copy_(tensor)
        moments = {number: _below(tensors, f"adam.{number}.") for number in range(len(parameters))}
        state = {number: found for number, found in moments.items() if found}
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": state})
        self._best = _below(tensors, "best.") or None
        self._losses = _Losses(**header["losses"])
        self.step, self.loss = header["step"], header["loss"]
        self.tokens = header.get("tokens", 0)
        self._batches = islice(shuffled_batches(self._examples, self.spec.batch_size, self.spec.seed), self.step, None)


def saved_source(data: bytes) -> PrefixTensors | None:
    """The stored prefix that a saved run started from, if it did. Raises StateMismatch."""
    return _below(_read(data)[0], "source.") or None


def is_due(step: int, steps: int, times: int) -> bool:
    """Whether a step, counted from 1, is one of at most `times` spread evenly over the run, or its last."""
    return step == steps or step % math.ceil(steps / times) == 0


def finite(loss: float, what: str) -> float:
    """The loss. Raises FloatingPointError unless it is a number."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the {what} loss became {loss}; a smaller learning_rate may help")
    return loss


def _below(tensors: dict[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _read(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])["__metadata__"][STATE_KEY]
        return load(data), json.loads(header)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StateMismatch(f"not a saved run: {error}") from None
