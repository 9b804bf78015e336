"""The numbers that a prefix must match to fit a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelGeometry:
    """Shape of a frozen model, as far as a prefix can see it.

    `family` is transformers' `model_type`. `kv_heads` and `head_dim` are those of the KV cache, which grouped-query
    models and models with an explicit head size do not derive from `hidden_size / query_heads`.
    """

    family: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        """`[L, 2, Hkv, D]`: canonical KV without its virtual-token axis."""
        return self.layers, 2, self.kv_heads, self.head_dim

    @property
    def kv_numbers_per_token(self) -> int:
        """Keys and values of one token over all layers, in numbers (not bytes)."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def differences(self, other: ModelGeometry) -> list[str]:
        """What `other` has that this one does not expect, as 'layers: expected 12, got 24'."""
        mine, theirs = self.to_json(), other.to_json()
        return [f"{key}: expected {mine[key]}, got {theirs[key]}" for key in mine if mine[key] != theirs[key]]

    def to_json(self) -> dict[str, Any]:
        """The JSON object that stands in a prefix file's header."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> ModelGeometry:
        """Reads `to_json`'s object. Raises ValueError on a missing, extra or wrongly typed field."""
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        if not isinstance(data, dict) or set(data) != set(fields):
            raise ValueError(f"geometry must be an object with exactly the fields {', '.join(fields)}")
        for key, value in data.items():
            if key == "family":
                if not isinstance(value, str):
                    raise ValueError("geometry.family must be a string")
            elif type(value) is not int or not 0 < value < 2**31:
                raise ValueError(f"geometry.{key} must be a positive integer")
        return cls(**data)
