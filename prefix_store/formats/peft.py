"""PEFT's PREFIX_TUNING and CARTRIDGE adapters of causal models: one tensor `[P, 2*L*Hkv*D]`.

Column `(2*layer + c)*Hkv*D + head*D + j` of row `p` is number `j` of virtual token `p`, c being 0 for keys and 1
for values. Real tokens start at position P, and sliding-window layers let the prefix slide out of sight.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from prefix_store.errors import InvalidPrefix, InvalidRequest, PrefixMismatch
from prefix_store.geometry import ModelGeometry
from prefix_store.prefix import Method, PrefixManifest, Window
from prefix_store.safetensors_file import read_header, read_tensors, strict_json
from prefix_store.tensors import PAYLOADS, PrefixTensors, validate

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
TENSOR = "prompt_embeddings"
PEFT_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
TASK_TYPE = "CAUSAL_LM"
MAX_CONFIG = 65_536  # bytes
_KV = PAYLOADS[Method.PREFIX]


def read(config: bytes | None, tensors_path: Path, geometry: ModelGeometry) -> tuple[PrefixManifest, PrefixTensors]:
    """Reads an adapter for a model of the given geometry; without a config the tensor's shape decides.

    Raises InvalidPrefix for what is damaged or not such an adapter, PrefixMismatch for what does not fit the model.
    """
    fields = _parse(config) if config is not None else {}
    shapes = read_header(tensors_path).shapes
    if set(shapes) != {TENSOR}:
        raise InvalidPrefix(
            f"expected the one tensor {TENSOR!r}, got {sorted(name[:40] for name in shapes)[:8]}", param="file"
        )
    length = _virtual_tokens(shapes[TENSOR], geometry)
    _check_numbers(fields, length, geometry)
    manifest = PrefixManifest(Method.PREFIX, geometry, length, position_offset=length, window=Window.SLIDES)
    tensors = {_KV: _from_flat(read_tensors(tensors_path)[TENSOR], geometry)}
    validate(manifest, tensors)
    return manifest, tensors


def write(
    manifest: PrefixManifest, tensors: PrefixTensors, base_model_name: str, *, sliding_window: bool
) -> dict[str, bytes]:
    """The adapter's files by name. Raises InvalidRequest for what the format cannot say.

    `sliding_window`: whether the frozen model has sliding-window layers; only there does `window` mean anything.
    """
    _check_expressible(manifest, sliding_window)
    flat = _to_flat(tensors[_KV])
    return {
        CONFIG_FILE: json.dumps(_config(manifest, base_model_name), indent=2, sort_keys=True).encode(),
        TENSORS_FILE: save({TENSOR: flat}, {"format": "pt"}),
    }


def _from_flat(flat: torch.Tensor, geometry: ModelGeometry) -> torch.Tensor:
    layers, pair, heads, size = geometry.kv_shape
    return flat.view(len(flat), layers, pair, heads, size).permute(1, 2, 3, 0, 4).contiguous()


def _to_flat(kv: torch.Tensor) -> torch.Tensor:
    return kv.detach().cpu().permute(3, 0, 1, 2, 4).flatten(1).contiguous()


def _parse(config: bytes) -> dict[str, Any]:
    if len(config) > MAX_CONFIG:
        raise _config_error("size", f"at most {MAX_CONFIG} bytes", len(config))
    fields = strict_json(config, CONFIG_FILE, param="config")
    if fields.get("peft_type") not in PEFT_TYPES:
        raise _config_error("peft_type", " or ".join(PEFT_TYPES), fields.get("peft_type"))
    if fields.get("task_type") not in (None, TASK_TYPE):
        raise _config_error("task_type", TASK_TYPE, fields["task_type"])
    return fields


def _virtual_tokens(shape: tuple[int, ...], geometry: ModelGeometry) -> int:
    columns = geometry.kv_numbers_per_token
    if len(shape) != 2 or shape[0] < 1:
        raise InvalidPrefix(f"{TENSOR}: expected shape [virtual tokens, {columns}], got {list(shape)}", param="file")
    if shape[1] != columns:
        soft = " (this is the width of a soft prompt)" if shape[1] == geometry.hidden_size else ""
        raise PrefixMismatch(
            f"{TENSOR}: this model needs 2*{geometry.layers} layers*{geometry.kv_heads} KV heads*"
            f"{geometry.head_dim} = {columns} columns, got {shape[1]}{soft}",
            param="file",
        )
    return shape[0]


def _check_numbers(fields: dict[str, Any], length: int, geometry: ModelGeometry) -> None:
    expected = {
        "num_virtual_tokens": (length, InvalidPrefix),
        "num_transformer_submodules": (1, InvalidPrefix),
        "num_layers": (geometry.layers, PrefixMismatch),
        "num_attention_heads": (geometry.kv_heads, PrefixMismatch),
        "token_dim": (geometry.kv_heads * geometry.head_dim, PrefixMismatch),
    }
    for key, (number, error) in expected.items():
        value = fields.get(key)
        if value is not None and (type(value) is not int or value != number):
            raise _config_error(key, number, value, error)


def _config_error(
    field: str, expected: object, got: object, error: type[InvalidPrefix] = InvalidPrefix
) -> InvalidPrefix:
    return error(f"{CONFIG_FILE}: {field}: expected {expected}, got {str(got)[:80]}", param="config")


def _check_expressible(manifest: PrefixManifest, sliding_window: bool) -> None:
    impossible = {
        f"a {manifest.method} prefix is not per-layer keys and values": PAYLOADS[manifest.method] != _KV,
        "its template would be lost": manifest.template is not None,
        "real tokens would start at another position": manifest.position_offset != manifest.virtual_tokens,
        "sliding-window layers would let the prefix slide out of sight, and this one is always seen": (
            sliding_window and manifest.window is Window.ALWAYS
        ),
    }
    for reason, holds in impossible.items():
        if holds:
            raise InvalidRequest(f"this prefix cannot be exported to PEFT: {reason}", param="format")


def _config(manifest: PrefixManifest, base_model_name: str) -> dict[str, Any]:
    geometry = manifest.geometry
    return {
        "peft_type": PEFT_TYPES[0],
        "task_type": TASK_TYPE,
        "inference_mode": True,
        "base_model_name_or_path": base_model_name,
        "revision": None,
        "num_virtual_tokens": manifest.virtual_tokens,
        "num_layers": geometry.layers,
        "num_attention_heads": geometry.kv_heads,
        "token_dim": geometry.kv_heads * geometry.head_dim,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": geometry.kv_heads * geometry.head_dim,
        "prefix_projection": False,
    }
