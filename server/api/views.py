"""Stored records as the API shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefix_store.jobs import JobEvent, TrainingJob
from prefix_store.prefix import PrefixVersion


def prefix(version: PrefixVersion) -> dict[str, Any]:
    """A version of a prefix. `base_checked`: its file names the base model it was made for, and it is this one."""
    return {
        "id": version.name,
        "object": "prefix",
        "version": version.version,
        "digest": version.digest,
        "method": version.method,
        "virtual_tokens": version.virtual_tokens,
        "size_bytes": version.size_bytes,
        "created_at": int(version.created_at),
        "base_checked": version.base_digest is not None,
        "job_id": version.job_id,
    }


def job(found: TrainingJob) -> dict[str, Any]:
    """A training job."""
    options = found.spec.to_json()
    return {
        "id": found.id,
        "object": "job",
        "prefix_id": found.name,
        "status": found.status,
        "version": found.version,
        "created_at": int(found.created_at),
        "started_at": _seconds(found.started_at),
        "finished_at": _seconds(found.finished_at),
        "attempt": found.attempt,
        "cancel_requested": found.cancel_requested,
        "progress": found.progress,
        "error": found.error and {"code": found.error.code, "message": found.error.message},
        "examples": options.pop("examples"),
        "options": {name: value for name, value in options.items() if name != "data_digest"},
    }


def event(found: JobEvent) -> dict[str, Any]:
    """One line of a job's history."""
    return {
        "object": "job.event",
        "sequence": found.sequence,
        "created_at": found.created_at,
        "type": found.kind,
        "data": found.data,
    }


def page(items: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A list page, made from up to `limit + 1` items."""
    return {"object": "list", "data": list(items[:limit]), "has_more": len(items) > limit}


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
