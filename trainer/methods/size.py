"""How many numbers a built-in method tunes, known before any of them is made: an encoder's may be more than there is
memory for."""

from __future__ import annotations

from collections.abc import Callable

from prefix_store.geometry import Stack
from prefix_store.jobs import TrainingSpec
from prefix_store.model.frozen import FrozenModel
from trainer.methods import encoder
from trainer.methods.prefix import tuned_tokens
from trainer.methods.prefix_mlp import MLPPrefix
from trainer.methods.prompt_encoded import EncodedPrompt, LSTMPrompt, MLPPrompt
from trainer.methods.start import Start, asked_stacks

_Size = Callable[[FrozenModel, TrainingSpec, Start], int]


def tuned(frozen: FrozenModel, spec: TrainingSpec, start: Start) -> int | None:
    """Numbers in all of the method's parameters; None for a method that is not built in."""
    count = _SIZES.get(spec.method)
    return count(frozen, spec, start) if count is not None else None


def _each_stack(of_shape: Callable[[tuple[int, int, int, int], TrainingSpec], int]) -> _Size:
    def count(frozen: FrozenModel, spec: TrainingSpec, start: Start) -> int:
        stacks = asked_stacks(spec, start) if frozen.is_encoder_decoder else [Stack.SELF]
        return sum(of_shape(frozen.geometry.kv_shape_of(stack), spec) for stack in stacks)

    return count


def _prefix(kv_shape: tuple[int, int, int, int], spec: TrainingSpec) -> int:
    layers, two, heads, dim = kv_shape
    return tuned_tokens(spec) * layers * two * heads * dim


def _prefix_mlp(kv_shape: tuple[int, int, int, int], spec: TrainingSpec) -> int:
    layers, two, heads, dim = kv_shape
    body = MLPPrefix.body
    width = heads * dim
    return encoder.size(lambda: body(width, spec.bottleneck), tuned_tokens(spec), width, layers * two * width)


def _prompt(frozen: FrozenModel, spec: TrainingSpec, start: Start) -> int:
    return spec.virtual_tokens * frozen.geometry.hidden_size


def _encoded(method: type[EncodedPrompt]) -> _Size:
    def count(frozen: FrozenModel, spec: TrainingSpec, start: Start) -> int:
        width = frozen.geometry.hidden_size
        return encoder.size(lambda: method.body(width, spec.bottleneck), spec.virtual_tokens, width, width)

    return count


def _prefix_plus(frozen: FrozenModel, spec: TrainingSpec, start: Start) -> int:
    geometry = frozen.geometry
    return geometry.layers * geometry.query_heads * geometry.head_dim**2


_SIZES: dict[str, _Size] = {
    "prefix": _each_stack(_prefix),
    "prefix_mlp": _each_stack(_prefix_mlp),
    "prompt": _prompt,
    "prompt_mlp": _encoded(MLPPrompt),
    "prompt_lstm": _encoded(LSTMPrompt),
    "prefix_plus": _prefix_plus,
}
