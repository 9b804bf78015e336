"""Stored records as the API shows them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from prefix_store import layout
from prefix_store.jobs import JobEvent, JobStatus, TrainingJob
from prefix_store.name_records import NameRecord
from prefix_store.prefix import PrefixVersion

# what a job has beside what was asked for by name
NO_OPTIONS = {"data_digest", "examples", "validation_examples", "chat_template", "unset"}


def prefix(version: PrefixVersion, reader: str, record: NameRecord | None = None) -> dict[str, Any]:
    """A version of a prefix, as the tenant `reader` sees it; with its name's record, also what it is called.

    `base_checked`: its file names the base model it was made for, and it is this one.
    """
    own = version.tenant == reader
    shown = {
        "id": version.name,
        "object": "prefix",
        "version": version.version,
        "digest": version.digest,
        "method": version.method,
        "virtual_tokens": version.virtual_tokens,
        "size_bytes": version.size_bytes,
        "created_at": int(version.created_at),
        "base_checked": version.base_digest is not None,
        "job_id": version.job_id if own else None,
        "metadata": version.metadata,
        "pinned": version.pinned,
        "expires_at": _seconds(version.expires_at),
    }
    if record is not None:
        shown |= {"current": record.current == version.version, "aliases": record.aliases_of(version.version)}
    return shown if own else {"tenant": version.tenant, **shown}


def published(version: PrefixVersion) -> dict[str, Any]:
    """A version that has just become the current one of its name."""
    return prefix(version, version.tenant, NameRecord(version.version, version.version))


def sharing(name: str, record: NameRecord) -> dict[str, Any]:
    """Whom a name is shared with."""
    tenants = "all" if layout.EVERYONE in record.shared else record.shared
    return {"id": name, "object": "prefix.sharing", "tenants": tenants}


def job(found: TrainingJob) -> dict[str, Any]:
    """A training job. An option that is left to the worker is null.

    `silent_seconds`: how long a running one's worker has not said that it is alive; a dead one is noticed when its
    lease runs out.
    """
    is_heard = found.status is JobStatus.RUNNING and found.heartbeat_at is not None
    options = found.spec.to_json() | dict.fromkeys(found.spec.unset)
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
        "heartbeat_at": _seconds(found.heartbeat_at),
        "silent_seconds": max(0, int(time.time() - (found.heartbeat_at or 0.0))) if is_heard else None,
        "cancel_requested": found.cancel_requested,
        "pause_requested": found.pause_requested,
        "progress": found.progress,
        "error": found.error and {"code": found.error.code, "message": found.error.message},
        "examples": options["examples"],
        "validation_examples": options["validation_examples"],
        "options": {name: value for name, value in options.items() if name not in NO_OPTIONS},
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
