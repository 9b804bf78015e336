"""PEFT's adapters that are prompts: a config, and one tensor of `P` rows. Those of causal models stand here.

| `peft_type` | the tensor | what it becomes | what is not kept |
|---|---|---|---|
| PREFIX_TUNING | flat keys and values | `prefix` | |
| CARTRIDGE | the same | `prefix` | how many of its first tokens were frozen in training |
| PROMPT_TUNING | embeddings `[P, E]` | `prompt` | |
| P_TUNING | what the encoder made of them | `prompt` | the encoder, whose weights PEFT does not save |

Written are PREFIX_TUNING and PROMPT_TUNING, with the tensor bit for bit. Either way real tokens start at position P,
and sliding-window layers let the prefix slide out of sight.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from prefix_store.errors import InvalidPrefix, InvalidRequest, PrefixMismatch
from prefix_store.formats import flat, peft_seq2seq
from prefix_store.formats.peft_config import CONFIG_FILE, TENSOR, check_numbers, config_error
from prefix_store.geometry import ModelGeometry, Stack
from prefix_store.prefix import Method, PrefixManifest, Window
from prefix_store.safetensors_file import read_header, read_tensors, strict_json
from prefix_store.tensors import PAYLOADS, PrefixTensors, validate

TENSORS_FILE = "adapter_model.safetensors"
METHODS = {
    "PREFIX_TUNING": Method.PREFIX,
    "CARTRIDGE": Method.PREFIX,
    "PROMPT_TUNING": Method.PROMPT,
    "P_TUNING": Method.PROMPT,
}
TASK_TYPE = "CAUSAL_LM"
MAX_CONFIG = 65_536  # bytes
_WRITTEN_AS = {flat.KV: "PREFIX_TUNING", PAYLOADS[Method.PROMPT]: "PROMPT_TUNING"}


def read(config: bytes | None, tensors_path: Path, geometry: ModelGeometry) -> tuple[PrefixManifest, PrefixTensors]:
    """Reads an adapter for a model of the given geometry; without a config the tensor's shape decides.

    Raises InvalidPrefix for what is damaged or not such an adapter, PrefixMismatch for what does not fit the model.
    """
    fields = _parse(config, geometry)
    shapes = read_header(tensors_path).shapes
    if set(shapes) != {TENSOR}:
        raise InvalidPrefix(
            f"expected the one tensor {TENSOR!r}, got {sorted(name[:40] for name in shapes)[:8]}", param="file"
        )
    describe = _describe if geometry.encoder is None else peft_seq2seq.describe
    describe(fields, shapes[TENSOR], geometry)  # before any number is read
    return _convert(fields, read_tensors(tensors_path)[TENSOR], geometry)


def read_tensor(
    config: bytes | None, tensor: torch.Tensor, geometry: ModelGeometry
) -> tuple[PrefixManifest, PrefixTensors]:
    """As `read`, of an adapter's one tensor that comes from elsewhere."""
    return _convert(_parse(config, geometry), tensor, geometry)


def write(
    manifest: PrefixManifest, tensors: PrefixTensors, base_model_name: str, *, sliding_window: bool
) -> dict[str, bytes]:
    """The adapter's files by name. Raises InvalidRequest for what the format cannot say.

    `sliding_window`: whether the frozen model has sliding-window layers; only there does `window` mean anything.
    """
    _check_expressible(manifest, sliding_window)
    payload = PAYLOADS[manifest.method]
    if manifest.geometry.encoder is not None:
        own, tensor = peft_seq2seq.write(manifest, tensors)
    else:
        own = {"task_type": TASK_TYPE, **{name: number for name, (number, _) in _numbers(manifest).items()}}
        tensor = flat.write(tensors[payload]) if payload == flat.KV else tensors[payload].detach().cpu().contiguous()
    return {
        CONFIG_FILE: json.dumps(_config(manifest, base_model_name) | own, indent=2, sort_keys=True).encode(),
        TENSORS_FILE: save({TENSOR: tensor}, {"format": "pt"}),
    }


def _convert(
    fields: dict[str, Any], tensor: torch.Tensor, geometry: ModelGeometry
) -> tuple[PrefixManifest, PrefixTensors]:
    if geometry.encoder is not None:
        return peft_seq2seq.read(fields, tensor, geometry)
    manifest = _describe(fields, tuple(tensor.shape), geometry)
    if manifest.method is Method.PREFIX:
        return flat.read(tensor, geometry, TENSOR)
    tensors = {PAYLOADS[Method.PROMPT]: tensor.contiguous()}
    validate(manifest, tensors)
    return manifest, tensors


def _describe(fields: dict[str, Any], shape: tuple[int, ...], geometry: ModelGeometry) -> PrefixManifest:
    """The manifest of an adapter, once its config and its tensor's shape agree with one another and the model."""
    method = METHODS[fields["peft_type"]] if fields else _method_by_width(shape, geometry)
    describe = flat.describe if method is Method.PREFIX else _describe_prompt
    manifest = describe(shape, geometry, TENSOR)
    check_numbers(fields, _numbers(manifest))
    return manifest


def _describe_prompt(shape: tuple[int, ...], geometry: ModelGeometry, name: str) -> PrefixManifest:
    width, kv_width = geometry.hidden_size, geometry.kv_numbers_per_token
    if len(shape) != 2 or shape[0] < 1:
        raise InvalidPrefix(f"{name}: expected shape [virtual tokens, {width}], got {list(shape)}", param="file")
    if shape[1] != width:
        raise PrefixMismatch(
            f"{name}: this model's soft prompts have {width} columns, got {shape[1]}; keys and values have {kv_width}",
            param="file",
        )
    return PrefixManifest(Method.PROMPT, geometry, shape[0], position_offset=shape[0], window=Window.SLIDES)


def _method_by_width(shape: tuple[int, ...], geometry: ModelGeometry) -> Method:
    is_prompt = shape[-1:] == (geometry.hidden_size,)
    if is_prompt and geometry.hidden_size == geometry.kv_numbers_per_token:
        raise InvalidPrefix(
            f"{TENSOR}: with {shape[-1]} columns it may be keys and values of this model as well as a soft prompt; "
            f"send its {CONFIG_FILE} along",
            param="config",
        )
    return Method.PROMPT if is_prompt else Method.PREFIX


def _parse(config: bytes | None, geometry: ModelGeometry) -> dict[str, Any]:
    """The config's fields; none without a config."""
    if config is None:
        return {}
    if len(config) > MAX_CONFIG:
        raise config_error("size", f"at most {MAX_CONFIG} bytes", len(config))
    fields = strict_json(config, CONFIG_FILE, param="config")
    kind = fields.get("peft_type")
    if not isinstance(kind, str) or kind not in METHODS:
        raise config_error("peft_type", " or ".join(METHODS), kind)
    task = TASK_TYPE if geometry.encoder is None else peft_seq2seq.TASK_TYPE
    if fields.get("task_type") not in (None, task):
        raise config_error("task_type", task, fields["task_type"])
    return fields


def _numbers(manifest: PrefixManifest) -> dict[str, tuple[int, type[InvalidPrefix]]]:
    """What a config must say where it says it, and how it fails otherwise."""
    heads, width = _heads_and_width(manifest)
    return {
        "num_virtual_tokens": (manifest.virtual_tokens, InvalidPrefix),
        "num_transformer_submodules": (1, InvalidPrefix),
        "num_layers": (manifest.geometry.layers, PrefixMismatch),
        "num_attention_heads": (heads, PrefixMismatch),
        "token_dim": (width, PrefixMismatch),
    }


def _heads_and_width(manifest: PrefixManifest) -> tuple[int, int]:
    """PEFT's `num_attention_heads` and `token_dim`: those of the KV cache, or for a soft prompt the model's own."""
    geometry = manifest.geometry
    if PAYLOADS[manifest.method] == flat.KV:
        return geometry.kv_heads, geometry.kv_heads * geometry.head_dim
    return geometry.query_heads, geometry.hidden_size


def _offset(manifest: PrefixManifest) -> int:
    """Where PEFT has real tokens start: an encoder's soft prompt does not move the decoder."""
    is_read = manifest.geometry.encoder is not None and manifest.method is Method.PROMPT
    return 0 if is_read else manifest.virtual_tokens


def _check_expressible(manifest: PrefixManifest, sliding_window: bool) -> None:
    impossible = {
        f"a {manifest.method} prefix is neither keys and values nor embeddings": (
            PAYLOADS[manifest.method] not in _WRITTEN_AS
        ),
        "its template would be lost": manifest.template is not None,
        "it has keys and values for more than the decoder's own attention": manifest.stacks != (Stack.SELF,),
        "real tokens would start at another position": manifest.position_offset != _offset(manifest),
        "sliding-window layers would let the prefix slide out of sight, and this one is always seen": (
            sliding_window and manifest.window is Window.ALWAYS
        ),
    }
    for reason, holds in impossible.items():
        if holds:
            raise InvalidRequest(f"this prefix cannot be exported to PEFT: {reason}", param="format")


def _config(manifest: PrefixManifest, base_model_name: str) -> dict[str, Any]:
    payload = PAYLOADS[manifest.method]
    _, width = _heads_and_width(manifest)
    kv_fields = {"prefix_projection": False, "encoder_hidden_size": width}
    return {
        "peft_type": _WRITTEN_AS[payload],
        "inference_mode": True,
        "base_model_name_or_path": base_model_name,
        "revision": None,
        **(kv_fields if payload == flat.KV else {"prompt_tuning_init": "RANDOM"}),
    }
