"""Small prefixes of every method, and safetensors files written by hand, sound or not."""

from __future__ import annotations

import json
from typing import Any

import torch

from prefix_store.geometry import ModelGeometry
from prefix_store.jobs import TrainingSpec
from prefix_store.prefix import Method, PrefixManifest
from prefix_store.tensors import PAYLOADS, PrefixTensors, payload_shape

GEOMETRY = ModelGeometry(family="llama", layers=2, query_heads=4, kv_heads=2, head_dim=3, hidden_size=12)
SPEC = TrainingSpec(data_digest="d" * 64, examples=3)
LENGTH = 5


class Clock:
    """Time that stands until it is moved."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def manifest(method: Method = Method.PREFIX, **changes: Any) -> PrefixManifest:
    plus = method is Method.PREFIX_PLUS
    fields = {
        "method": method,
        "geometry": GEOMETRY,
        "virtual_tokens": 0 if plus else LENGTH,
        "position_offset": 0 if plus else LENGTH,
        "feature_map": "elu" if plus else None,
    }
    return PrefixManifest(**{**fields, **changes})


def tensors(of: PrefixManifest, seed: int = 0, dtype: torch.dtype = torch.float32) -> PrefixTensors:
    values = torch.randn(payload_shape(of), generator=torch.Generator().manual_seed(seed))
    return {PAYLOADS[of.method]: values.to(dtype)}


def raw(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header, taken as it is when it is bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
