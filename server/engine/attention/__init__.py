"""Attention of a packed step over the KV pool: the table of backends, and the operator that hides them.

transformers calls `attention` once a layer under the name `antefix`. It unpacks the step into tensors and integers and
calls one `torch.library` operator, which stays opaque to compilers. No mask function is registered under that name, so
transformers builds no mask; the work list says who sees what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface

from prefix_store.errors import ModelUnsupported
from prefix_store.geometry import Stack
from prefix_store.model import arguments, sites
from server.engine.attention import cpu, memory, native, plain, segments, triton

NAME = "antefix"
BACKENDS: dict[str, Callable[..., torch.Tensor]] = {
    "native": native.attend,
    "cpu": partial(segments.attend, cpu.attend_item),
    "plain": partial(segments.attend, plain.attend_item),
    "triton": triton.attend,
}
# Backends that read a step's lists on the device, and that add what memories give by themselves.
ON_DEVICE = frozenset({"triton"})
_NO_WINDOW = 0


@dataclass(frozen=True)
class StackStep:
    """What a step's attention needs in one stack; `keys` and `values` `[L, S, Hkv, D]` are the stack's pool.

    The lists, `work` and `memories`, lie where `lists_device` says.

    `slots` `[T]`: where the key and the value of each packed token go; without any, they are written nowhere. `work`:
    one `[n, 8]` integer tensor for each sliding window in the model, 0 standing for none. `memories`: a `[m, 4]` one,
    or None where no row has a memory. `bias`: of relative positions, see `plain.relative`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor
    work: Mapping[int, torch.Tensor]
    memories: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class StepContext:
    """What a step's attention needs; rides through the model as the keyword argument `antefix`.

    `is_relative`: the model's positions are the stacks' biases, and those that it makes itself are of no account.
    """

    stacks: Mapping[Stack, StackStep]
    backend: str
    is_relative: bool = False


def lists_device(backend: str, device: torch.device) -> torch.device:
    """Where a backend reads the work and the memories of a step on that device: there, or on the host."""
    return device if backend in ON_DEVICE else torch.device("cpu")


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    antefix: StepContext,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention face: query `[1, Hq, T, D]`, key and value `[1, Hkv, T, D]`, after RoPE, not repeated.

    Raises ModelUnsupported on anything that would change the result and that is not understood here.
    """
    if attention_mask is not None:
        raise ModelUnsupported("the model insists on an attention mask of its own")
    if unknown := arguments.strange(others):
        raise ModelUnsupported(f"the model's attention uses {', '.join(unknown)}, which cannot be served yet")
    if position_bias is not None and not antefix.is_relative:
        raise ModelUnsupported("the model's attention uses position_bias, which cannot be served yet")
    window, site = sliding_window or _NO_WINDOW, sites.of(module)
    step = antefix.stacks[site.stack]
    output = torch.ops.antefix.attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        step.keys[site.layer],
        step.values[site.layer],
        step.slots,
        step.work[window],
        step.memories,
        step.bias,
        window,
        scaling,
        softcap or 0.0,
        antefix.backend,
    )
    return output[None], None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    work: torch.Tensor,
    memories: torch.Tensor | None,
    bias: torch.Tensor | None,
    window: int,
    scale: float,
    softcap: float,
    backend: str,
) -> torch.Tensor:
    """Writes the step's keys and values into the pool, then attends, then adds memories; `[T, Hq, D]`."""
    if len(slots):
        keys.index_copy_(0, slots, key.to(keys.dtype))
        values.index_copy_(0, slots, value.to(values.dtype))
    attend = partial(BACKENDS[backend], window=window, scale=scale, softcap=softcap, bias=bias)
    if backend in ON_DEVICE:
        return attend(query, keys, values, work, memories=memories)
    output = attend(query, keys, values, work)
    if memories is not None:
        memory.add(output, query, keys, values, memories)
    return output


def _attend_shape(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape)


_library = torch.library.Library("antefix", "DEF")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor work, "
    "Tensor? memories, Tensor? bias, int window, float scale, float softcap, str backend) -> Tensor"
)
_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("antefix::attend", _attend_shape, lib=_library)
AttentionInterface.register(NAME, attention)
