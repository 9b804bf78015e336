"""The numbers that a prefix must match to fit a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Stack(StrEnum):
    """Which attentions of a model a block of keys and values belongs to: one for each layer of the stack.

    SELF: the decoder's own, which is all that a decoder-only model has. CROSS: the decoder's, over what the encoder
    made of the source. ENCODER: the encoder's own.
    """

    SELF = "self"
    CROSS = "cross"
    ENCODER = "encoder"


def some_stacks(names: Any) -> tuple[Stack, ...]:
    """Stacks by their names, in the order of `Stack`, so that one set of stacks is one tuple.

    Raises ValueError unless they are one or more, each once.
    """
    if not isinstance(names, list | tuple) or not names or len({*map(str, names)}) != len(names):
        raise ValueError(f"stacks must be one or more of {', '.join(Stack)}, each once")
    if unknown := sorted(str(name)[:40] for name in names if name not in list(Stack)):
        raise ValueError(f"stacks must be of {', '.join(Stack)}, got {', '.join(unknown)}")
    return tuple(stack for stack in Stack if stack in names)


@dataclass(frozen=True)
class EncoderGeometry:
    """Shape of an encoder's self-attention; each head has keys and values of its own."""

    layers: int
    heads: int
    head_dim: int

    @classmethod
    def from_json(cls, data: Any) -> EncoderGeometry:
        """Reads the object of its fields. Raises ValueError on a missing, extra or wrongly typed one."""
        return cls(**_read(cls, data, "geometry.encoder"))


@dataclass(frozen=True)
class ModelGeometry:
    """Shape of a frozen model, as far as a prefix can see it: its decoder's, and its encoder's where it has one.

    `family` is transformers' `model_type`. `kv_heads` and `head_dim` are those of the KV cache, which grouped-query
    models and models with an explicit head size do not derive from `hidden_size / query_heads`.
    """

    family: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    encoder: EncoderGeometry | None = None

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        """`[L, 2, Hkv, D]`: canonical KV of the decoder's stacks without its virtual-token axis."""
        return self.layers, 2, self.kv_heads, self.head_dim

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks that the model has."""
        return (Stack.SELF,) if self.encoder is None else tuple(Stack)

    def kv_shape_of(self, stack: Stack) -> tuple[int, int, int, int]:
        """`kv_shape` of one of the model's stacks."""
        if stack is not Stack.ENCODER:
            return self.kv_shape
        assert self.encoder is not None
        return self.encoder.layers, 2, self.encoder.heads, self.encoder.head_dim

    @property
    def kv_numbers_per_token(self) -> int:
        """Keys and values of one token over all layers, in numbers (not bytes)."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def differences(self, other: ModelGeometry) -> list[str]:
        """What `other` has that this one does not expect, as 'layers: expected 12, got 24'."""
        if self == other:
            return []
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [f"{key}: expected {mine[key]}, got {theirs[key]}" for key in mine if mine[key] != theirs[key]]

    def to_json(self) -> dict[str, Any]:
        """The JSON object that stands in a prefix file's header; a model without an encoder has no such key."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: Any) -> ModelGeometry:
        """Reads `to_json`'s object. Raises ValueError on a missing, extra or wrongly typed field."""
        fields = _read(cls, data, "geometry", optional=["encoder"])
        if not isinstance(fields["family"], str):
            raise ValueError("geometry.family must be a string")
        encoder = EncoderGeometry.from_json(fields["encoder"]) if "encoder" in fields else None
        return cls(**{**fields, "encoder": encoder})


def _read(of: type, data: Any, what: str, optional: Sequence[str] = ()) -> dict[str, Any]:
    """The object of a dataclass's fields, those that are numbers checked."""
    names = [field.name for field in dataclasses.fields(of)]
    required = [name for name in names if name not in optional]
    if not isinstance(data, dict) or not set(required) <= set(data) <= set(names):
        raise ValueError(f"{what} must be an object with exactly the fields {', '.join(required)}")
    for key, value in data.items():
        if key != "family" and key not in optional and (type(value) is not int or not 0 < value < 2**31):
            raise ValueError(f"{what}.{key} must be a positive integer")
    return data
