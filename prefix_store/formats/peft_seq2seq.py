"""PEFT's adapters of encoder-decoder models, as PEFT 0.21 means them.

PREFIX_TUNING gives keys and values to the decoder's own attention alone, and the decoder begins at position P. Of the L
layers that the flat tensor has columns for (PEFT takes the encoder's number), decoder layer l gets the one that
`slot_of` says: PEFT doubles the 2 L blocks and deals them out four by four, of which the layer keeps two. So with an
even L half of the tensor is never looked at, and layers l and l + L/2 share what they get; with an odd one the layers
are in another order. Written are as many layers as the decoder has, or one more if that is even, which no layer asks
for: then no two share.

PROMPT_TUNING and P_TUNING have `num_transformer_submodules` times P rows, of which the encoder gets the first P, in
front of the source; nothing gets the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from prefix_store.errors import InvalidPrefix, PrefixMismatch
from prefix_store.formats import flat
from prefix_store.formats.peft_config import CONFIG_FILE, TENSOR, check_numbers, config_error
from prefix_store.geometry import ModelGeometry
from prefix_store.prefix import Method, PrefixManifest, Window
from prefix_store.tensors import PAYLOADS, PrefixTensors, validate

TASK_TYPE = "SEQ_2_SEQ_LM"
METHODS = {"PREFIX_TUNING": Method.PREFIX, "PROMPT_TUNING": Method.PROMPT, "P_TUNING": Method.PROMPT}
SUBMODULES = 2
EMBEDS = PAYLOADS[Method.PROMPT]


def slot_of(layer: int, layers: int) -> int:
    """Which of the flat tensor's `layers` a decoder's layer gets."""
    return 2 * layer % layers


def describe(fields: Mapping[str, Any], shape: tuple[int, ...], geometry: ModelGeometry) -> PrefixManifest:
    """The manifest of an adapter. Raises InvalidPrefix, and PrefixMismatch for one that PEFT could not run either."""
    kind = fields.get("peft_type", "PREFIX_TUNING")
    if kind not in METHODS:
        raise config_error("peft_type", " or ".join(METHODS), kind)
    if len(shape) != 2 or shape[0] < 1:
        raise InvalidPrefix(f"{TENSOR}: expected shape [virtual tokens, columns], got {list(shape)}", param="file")
    if not fields and shape[1] == geometry.hidden_size:
        raise InvalidPrefix(
            f"{TENSOR}: with {shape[1]} columns it is a soft prompt, whose length {CONFIG_FILE} says; send that along",
            param="config",
        )
    return (_describe_kv if METHODS[kind] is Method.PREFIX else _describe_prompt)(fields, shape, geometry)


def read(
    fields: Mapping[str, Any], tensor: torch.Tensor, geometry: ModelGeometry
) -> tuple[PrefixManifest, PrefixTensors]:
    """The prefix in an adapter's one tensor. Raises what `describe` raises."""
    manifest = describe(fields, tuple(tensor.shape), geometry)
    if manifest.method is Method.PROMPT:
        tensors = {EMBEDS: tensor[: manifest.virtual_tokens].contiguous()}
    else:
        given = flat.by_layer(tensor, geometry.kv_heads, geometry.head_dim)
        slots = [slot_of(layer, len(given)) for layer in range(geometry.layers)]
        tensors = {flat.KV: given[slots].contiguous()}
    validate(manifest, tensors)
    return manifest, tensors


def write(manifest: PrefixManifest, tensors: PrefixTensors) -> tuple[dict[str, Any], torch.Tensor]:
    """What the config says beside the method, and the tensor."""
    geometry, length = manifest.geometry, manifest.virtual_tokens
    fields = {"task_type": TASK_TYPE, "num_virtual_tokens": length}
    if manifest.method is Method.PROMPT:
        own = {"num_transformer_submodules": 1, "num_layers": geometry.layers, "num_attention_heads": 1}
        return {**fields, **own, "token_dim": geometry.hidden_size}, tensors[EMBEDS].detach().cpu().contiguous()
    kv = tensors[flat.KV]
    layers = len(kv) + (len(kv) + 1) % 2
    given = kv.new_zeros(layers, *kv.shape[1:])
    given[[slot_of(layer, layers) for layer in range(len(kv))]] = kv
    return {**fields, **_numbers(layers, geometry)}, flat.write(given)


def _numbers(layers: int, geometry: ModelGeometry) -> dict[str, int]:
    return {
        "num_transformer_submodules": SUBMODULES,
        "num_layers": layers,
        "num_attention_heads": geometry.kv_heads,
        "token_dim": geometry.kv_heads * geometry.head_dim,
    }


def _describe_kv(fields: Mapping[str, Any], shape: tuple[int, ...], geometry: ModelGeometry) -> PrefixManifest:
    length, columns = shape
    width = geometry.kv_heads * geometry.head_dim
    layers, rest = divmod(columns, 2 * width)
    if (given := fields.get("token_dim")) not in (None, width):
        raise config_error("token_dim", f"{width}, as wide as the decoder's keys,", given, PrefixMismatch)
    if rest or not layers:
        raise PrefixMismatch(
            f"{TENSOR}: expected 2*{geometry.kv_heads} heads*{geometry.head_dim} = {2 * width} columns for each layer, "
            f"got {columns} columns in all",
            param="file",
        )
    if layers < geometry.layers:
        raise PrefixMismatch(
            f"{TENSOR}: it has keys and values for {layers} layers and the decoder has {geometry.layers}; PEFT, which "
            "counts the encoder's layers, cannot run it either",
            param="file",
        )
    checked = {name: (number, PrefixMismatch) for name, number in _numbers(layers, geometry).items()}
    check_numbers(fields, {**checked, "num_virtual_tokens": (length, InvalidPrefix)})
    return PrefixManifest(Method.PREFIX, geometry, length, position_offset=length, window=Window.SLIDES)


def _describe_prompt(fields: Mapping[str, Any], shape: tuple[int, ...], geometry: ModelGeometry) -> PrefixManifest:
    rows, width = shape
    if width != geometry.hidden_size:
        raise PrefixMismatch(
            f"{TENSOR}: this model's soft prompts have {geometry.hidden_size} columns, got {width}", param="file"
        )
    times = fields.get("num_transformer_submodules") or SUBMODULES
    if times not in (1, SUBMODULES):
        raise config_error("num_transformer_submodules", "1 or 2", times)
    length, rest = divmod(rows, times)
    if rest or not length:
        raise InvalidPrefix(f"{TENSOR}: expected {times} rows for each virtual token, got {rows} in all", param="file")
    check_numbers(fields, {"num_virtual_tokens": (length, InvalidPrefix), "token_dim": (width, PrefixMismatch)})
    return PrefixManifest(Method.PROMPT, geometry, length, position_offset=0, window=Window.SLIDES)
