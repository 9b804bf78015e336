"""Safetensors files that strangers wrote: the header is checked by hand before any tensor is touched."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from prefix_store.errors import InvalidPrefix

MAX_HEADER = 100_000  # bytes; the reference implementation takes a thousand times more
MAX_TENSORS = 512
MAX_AXES = 8
MAX_AXIS = 2**40
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# how pickles of protocol 2 and later, and torch's and numpy's zip archives, begin
_CODE_CARRIERS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"PK\x05\x06")


@dataclass(frozen=True)
class Header:
    """What a file declares: the shape of every tensor, and its `__metadata__`."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Reads the declarations alone. Raises InvalidPrefix, with what was expected and what came.

    Holds afterwards: at most MAX_TENSORS tensors of F32, F16 or BF16 that fill the file from the header to its
    end with no hole, overlap or tail.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        _check_start(start, length, size)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise _refused(f"header: expected a JSON object, got {text[:8]!r}")
    entries = strict_json(text, "header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refused("header: __metadata__ must map strings to strings")
    if len(entries) > MAX_TENSORS:
        raise _refused(f"header: expected at most {MAX_TENSORS} tensors, got {len(entries)}")
    return Header(_shapes(entries, size - 8 - length), metadata)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file whose header was checked, in memory that does not depend on the file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise _refused(f"not a safetensors file: {str(error)[:200]}") from None


def strict_json(text: bytes | str, what: str, param: str = "file") -> dict[str, Any]:
    """Parses an object in which no key stands twice and every text can be written again. Raises InvalidPrefix."""
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=_unique, parse_constant=_no_constant)
        if "\\u" in decoded or not decoded.isascii():
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate can be parsed, but not encoded
    except RecursionError:
        raise _refused(f"{what}: nested too deeply", param) from None
    except ValueError as error:
        raise _refused(f"{what}: not valid JSON: {str(error)[:200]}", param) from None
    if not isinstance(value, dict):
        raise _refused(f"{what}: expected a JSON object, got {type(value).__name__}", param)
    return value


def _check_start(start: bytes, length: int, size: int) -> None:
    if start.startswith(_CODE_CARRIERS) and length > MAX_HEADER:
        raise _refused("pickle and zip files are refused, because opening one can run its code; expected safetensors")
    if len(start) < 8:
        raise _refused(f"not a safetensors file: expected at least 8 bytes, got {size}")
    if length > MAX_HEADER:
        raise _refused(f"not a safetensors file: expected a header of at most {MAX_HEADER} bytes, got {length}")
    if 8 + length > size:
        raise _refused(f"truncated: the header ends at byte {8 + length}, the file at byte {size}")


def _shapes(entries: dict[str, Any], data_bytes: int) -> dict[str, tuple[int, ...]]:
    shapes, spans = {}, []
    for name, entry in entries.items():
        shapes[name], begin, end = _entry(name, entry)
        spans.append((begin, end))
    cursor = 0
    for begin, end in sorted(spans):
        if begin != cursor:
            raise _refused(f"data: expected a tensor at offset {cursor}, got one at {begin}")
        cursor = end
    if cursor != data_bytes:
        raise _refused(f"data: the tensors end at byte {cursor}, the file at byte {data_bytes}")
    return shapes


def _entry(name: str, entry: Any) -> tuple[tuple[int, ...], int, int]:
    label = f"tensor {name[:40]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _refused(f"{label}: expected an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _refused(f"{label}: expected dtype {', '.join(ITEM_BYTES)}, got {str(dtype)[:20]!r}")
    if not _naturals(shape) or len(shape) > MAX_AXES or any(axis > MAX_AXIS for axis in shape):
        raise _refused(f"{label}: the shape must be at most {MAX_AXES} natural numbers of sane size")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _refused(f"{label}: data_offsets must be two natural numbers")
    begin, end = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected:
        raise _refused(f"{label}: expected {expected} bytes for {dtype} {shape}, got {end - begin}")
    return tuple(shape), begin, end


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _refused(message: str, param: str = "file") -> InvalidPrefix:
    return InvalidPrefix(message, param=param)
