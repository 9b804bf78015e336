"""The keys and values of every token in flight and of every resident prefix."""

from __future__ import annotations

import torch

from prefix_store.geometry import ModelGeometry
from server.scheduler.plan import Load, Move
from server.scheduler.slots import Extent


class KVPool:
    """Two tensors `[L, S, Hkv, D]`. A slot is one token's place; an extent is read as a view, never gathered."""

    def __init__(self, geometry: ModelGeometry, slots: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (geometry.layers, slots, geometry.kv_heads, geometry.head_dim)
        # The system hands out zeroed memory page by page as it is touched, so a large pool starts at once.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def slots(self) -> int:
        """S: how many tokens have a place."""
        return self.keys.shape[1]

    def apply(self, transfer: Load | Move) -> None:
        """Carries out one transfer of a plan."""
        if isinstance(transfer, Load):
            self._load(transfer.payload.tensor, transfer.extent)
        else:
            self._move(transfer)

    def _load(self, kv: torch.Tensor, extent: Extent) -> None:
        """Canonical `[L, 2, Hkv, P, D]` into slots `[P, Hkv, D]` of every layer."""
        self.keys[:, extent.start : extent.end].copy_(kv[:, 0].transpose(1, 2))
        self.values[:, extent.start : extent.end].copy_(kv[:, 1].transpose(1, 2))

    def _move(self, move: Move) -> None:
        source = slice(move.source.start, move.source.start + move.size)
        target = slice(move.target.start, move.target.start + move.size)
        self.keys[:, target].copy_(self.keys[:, source])
        self.values[:, target].copy_(self.values[:, source])


def bytes_per_slot(geometry: ModelGeometry, dtype: torch.dtype) -> int:
    """Device memory of one token's keys and values."""
    return geometry.kv_numbers_per_token * dtype.itemsize
