"""Manifest and tensors to the native file and back, and the digest that names it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save, save_file

from prefix_store.errors import InvalidPrefix, StoreUnavailable
from prefix_store.prefix import PrefixManifest
from prefix_store.safetensors_file import MAX_HEADER, Header, read_header, read_tensors, strict_json
from prefix_store.tensors import PrefixTensors, check_shapes, validate

METADATA_KEY = "antefix"


def encode(manifest: PrefixManifest, tensors: PrefixTensors) -> bytes:
    """The native file; equal content gives equal bytes. Raises InvalidPrefix for what `decode` would refuse."""
    data = save(_plain(tensors), _metadata(manifest, tensors))
    _check_header(data[:8])
    return data


def write(manifest: PrefixManifest, tensors: PrefixTensors, path: Path) -> None:
    """Writes the bytes of `encode` without having them in memory.

    Raises InvalidPrefix as it does, StoreUnavailable for what a disk fails with.
    """
    metadata = _metadata(manifest, tensors)
    try:
        save_file(_plain(tensors), path, metadata)
    except SafetensorError as error:
        raise StoreUnavailable(f"the prefix cannot be written: {error}") from error
    with path.open("rb") as file:
        _check_header(file.read(8))


def decode(path: Path) -> tuple[PrefixManifest, PrefixTensors]:
    """Reads a native file from anyone. The tensors own their memory. Raises InvalidPrefix for every flaw."""
    header = read_header(path)
    manifest = _manifest(header)
    check_shapes(manifest, header.shapes)
    tensors = read_tensors(path)
    validate(manifest, tensors)
    return manifest, tensors


def read_manifest(path: Path) -> PrefixManifest:
    """The manifest alone, without reading a tensor. Raises InvalidPrefix."""
    return _manifest(read_header(path))


def digest_of(source: bytes | Path) -> str:
    """sha256 in hex of a native file, given as its bytes or its path."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _metadata(manifest: PrefixManifest, tensors: PrefixTensors) -> dict[str, str]:
    """What the header says. Raises InvalidPrefix unless it and the tensors are sound."""
    text = json.dumps(manifest.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    PrefixManifest.from_json(strict_json(text, "manifest"))
    validate(manifest, tensors)
    return {METADATA_KEY: text}


def _plain(tensors: PrefixTensors) -> PrefixTensors:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _check_header(start: bytes) -> None:
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER:
        raise InvalidPrefix(f"manifest: expected at most {MAX_HEADER} bytes with its template, got {length}")


def _manifest(header: Header) -> PrefixManifest:
    if set(header.metadata) != {METADATA_KEY}:
        found = sorted(key[:40] for key in header.metadata)[:8]
        raise InvalidPrefix(f"__metadata__: expected the single key {METADATA_KEY!r}, got {found}", param="file")
    return PrefixManifest.from_json(strict_json(header.metadata[METADATA_KEY], "manifest"))
