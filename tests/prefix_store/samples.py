"""Small prefixes of every method, and safetensors files written by hand, sound or not."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from prefix_store import holds, job_records
from prefix_store.backends.base import Backend
from prefix_store.backends.blobs import FolderBlobs
from prefix_store.backends.redis_blobs import RedisBlobs
from prefix_store.backends.redis_client import CHUNK
from prefix_store.catalog import Catalog
from prefix_store.codec import digest_of
from prefix_store.files import StoredFile
from prefix_store.geometry import EncoderGeometry, ModelGeometry
from prefix_store.jobs import JobStatus, TrainingJob, TrainingSpec
from prefix_store.name_records import Draft
from prefix_store.prefix import Method, PrefixManifest, PrefixVersion
from prefix_store.store import Store
from prefix_store.tensors import PrefixTensors, shapes

GEOMETRY = ModelGeometry(family="llama", layers=2, query_heads=4, kv_heads=2, head_dim=3, hidden_size=12)
BOTH = ModelGeometry(
    family="bart", layers=3, query_heads=4, kv_heads=4, head_dim=3, hidden_size=12, encoder=EncoderGeometry(2, 2, 6)
)
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
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes(of).items()}


def raw(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header, taken as it is when it is bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def publish(
    backend: Backend,
    name: str = "support",
    tenant: str = "acme",
    digest: str = "a",
    job: TrainingJob | None = None,
    if_match: str | None = None,
    **draft: Any,
) -> PrefixVersion:
    """A version's records, without its file, which is of ten bytes under a digest of one letter repeated."""
    digest = (digest * 64)[:64]
    with holds.held(backend, tenant, digest) as hold:
        made = Draft(manifest(), digest, 10, hold, **draft)
        return Catalog(backend).publish(tenant, name, made, job, if_match, "local")


def damage(store: Store, digest: str, data: bytes | None) -> None:
    """Overwrites a small blob where it is kept; None removes it."""
    if isinstance(store.blobs, FolderBlobs):
        path = store.blobs._path(digest)
        path.unlink() if data is None else path.write_bytes(data)
        return
    assert isinstance(store.blobs, RedisBlobs)
    key = CHUNK.format(digest=digest, number=0)
    store.blobs._client.delete(key) if data is None else store.blobs._client.set(key, data)


def upload(store: Store, data: bytes, tenant: str = "acme", filename: str = "data.jsonl", **more: Any) -> StoredFile:
    """A file as it comes in over HTTP."""
    with store.blobs.spool() as path:
        path.write_bytes(data)
        return store.files.save(tenant, filename, path, digest_of(data), **more)


def enqueue(backend: Backend, *ids: str, tenant: str = "acme", **options: Any) -> None:
    """Jobs under these ids, without their examples' file."""
    spec = dataclasses.replace(SPEC, **options)
    for job_id in ids:
        backend.write(
            lambda transaction, job_id=job_id: job_records.add(
                transaction,
                TrainingJob(job_id, tenant, "support", spec, JobStatus.QUEUED, created_at=transaction.now),
            )
        )
