"""The keys and values of every token in flight and of every resident prefix, and the memories of those that have one.

A memory is no tokens, but it lies in slots like them: so one budget, one allocator and one eviction serve both. It is
held in the model's dtype, as keys and values are.

An encoder's layers have a pool of their own, of another shape, under the same slot numbers: what lies in a slot of the
one says nothing of the other, but whoever holds the slot has both.

The last slot is nobody's: there a step's padding writes what nobody reads.
"""

from __future__ import annotations

import math

import torch

from prefix_store.geometry import ModelGeometry, Stack
from server.scheduler.plan import Load, Move
from server.scheduler.slots import Extent

Pair = tuple[torch.Tensor, torch.Tensor]


class KVPool:
    """Two tensors `[L, S + 1, Hkv, D]`. A slot is one token's place; an extent is read as a view, never gathered.

    They are the decoder's: of its own attention and of its cross-attention. An encoder has two more.
    """

    def __init__(self, geometry: ModelGeometry, slots: int, *, dtype: torch.dtype, device: torch.device) -> None:
        def pair(stack: Stack) -> Pair:
            layers, _, heads, size = geometry.kv_shape_of(stack)
            # The system hands out zeroed memory page by page as it is touched, so a large pool starts at once.
            shape = (layers, slots + 1, heads, size)
            keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            return keys, values

        self.keys, self.values = decoder = pair(Stack.SELF)
        self._pairs = dict.fromkeys(geometry.stacks, decoder)
        if Stack.ENCODER in self._pairs:
            self._pairs[Stack.ENCODER] = pair(Stack.ENCODER)

    @property
    def slots(self) -> int:
        """S: how many tokens have a place. It is the number of the slot that is nobody's, too."""
        return self.keys.shape[1] - 1

    def of(self, stack: Stack) -> Pair:
        """Keys and values of all layers of a stack."""
        return self._pairs[stack]

    def apply(self, transfer: Load | Move) -> None:
        """Carries out one transfer of a plan."""
        if isinstance(transfer, Move):
            self._move(transfer)
        elif transfer.payload.feature_map is not None:
            self._load_memory(transfer.payload.tensor, transfer.extent)
        else:
            payload, start = transfer.payload, transfer.extent.start
            for stack, kv in zip(Stack, (payload.tensor, payload.cross, payload.encoder), strict=True):
                if stack in payload.stacks:
                    self._load(stack, kv, start + payload.offset(stack))

    def _load(self, stack: Stack, kv: torch.Tensor, start: int) -> None:
        """Canonical `[L, 2, Hkv, P, D]` into slots `[P, Hkv, D]` of every layer."""
        for pool, numbers in zip(self.of(stack), (kv[:, 0], kv[:, 1]), strict=True):
            pool[:, start : start + kv.shape[3]].copy_(numbers.transpose(1, 2))

    def _load_memory(self, memory: torch.Tensor, extent: Extent) -> None:
        """Canonical `[L, Hq, D, D]` into an extent of `memory_slots` slots."""
        first, second = memory_halves(self.keys, self.values, extent.start, memory.shape[1])
        first.copy_(memory[:, : first.shape[1]])
        second.copy_(memory[:, first.shape[1] :])

    def _move(self, move: Move) -> None:
        source = slice(move.source.start, move.source.start + move.size)
        target = slice(move.target.start, move.target.start + move.size)
        self.keys[:, target].copy_(self.keys[:, source])
        self.values[:, target].copy_(self.values[:, source])


def bytes_per_slot(geometry: ModelGeometry, dtype: torch.dtype) -> int:
    """Device memory of one token's keys and values, an encoder's too."""
    pools = [stack for stack in geometry.stacks if stack is not Stack.CROSS]
    return sum(math.prod(geometry.kv_shape_of(stack)) for stack in pools) * dtype.itemsize


def memory_slots(geometry: ModelGeometry) -> int:
    """Slots whose numbers, keys and values together, hold a memory's `[Hq, D, D]` in every layer."""
    heads = (geometry.query_heads + 1) // 2  # the larger half
    return -(-heads * geometry.head_dim // geometry.kv_heads)


def memory_halves(keys: torch.Tensor, values: torch.Tensor, start: int, heads: int) -> Pair:
    """The memory that lies in the slots from `start` on, as views `[..., heads, D, D]`.

    Of pools `[..., S, Hkv, D]`: the first half of the heads lies among the keys, the other among the values.
    """
    first = (heads + 1) // 2
    return _matrices(keys, start, first), _matrices(values, start, heads - first)


def _matrices(pool: torch.Tensor, start: int, heads: int) -> torch.Tensor:
    kv_heads, size = pool.shape[-2:]
    slots = -(-heads * size // kv_heads)
    numbers = pool[..., start : start + slots, :, :].flatten(-3)  # a view: slots lie one after another
    return numbers[..., : heads * size * size].unflatten(-1, (heads, size, size))
