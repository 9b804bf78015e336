"""The embedded backend: all records in one SQLite file."""
# ruff: noqa: D102  (the contracts stand in Backend)

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefix_store.backends.sqlite_file import SqliteFile
from prefix_store.backends.sqlite_records import (
    SCHEMA,
    SCHEMA_VERSION,
    insert_job,
    insert_key,
    insert_version,
    to_event,
    to_job,
    to_key,
    to_version,
)
from prefix_store.errors import Conflict, JobNotFound, LeaseLost
from prefix_store.jobs import (
    MAX_ATTEMPTS,
    TRANSITIONS,
    Heartbeat,
    JobError,
    JobEvent,
    JobStatus,
    TrainingJob,
    TrainingSpec,
)
from prefix_store.prefix import PrefixManifest, PrefixVersion
from prefix_store.tenants import ApiKey


class SqliteBackend:
    """Implements `backends.base.Backend`, where the contracts stand."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._file = SqliteFile(path, SCHEMA, SCHEMA_VERSION)
        self._clock = clock

    # prefixes

    def publish(
        self, tenant: str, name: str, manifest: PrefixManifest, digest: str, size_bytes: int, job: TrainingJob | None
    ) -> PrefixVersion:
        with self._file.write() as db:
            if job is not None:
                before = db.execute("SELECT * FROM versions WHERE job_id = ?", (job.id,)).fetchone()
                if before is not None:
                    return to_version(before)
                _check_owned(db, job)
            version = PrefixVersion(
                tenant=tenant,
                name=name,
                version=_next_version(db, tenant, name),
                digest=digest,
                method=manifest.method,
                virtual_tokens=manifest.virtual_tokens,
                size_bytes=size_bytes,
                created_at=self._clock(),
                base_digest=manifest.base_digest,
                job_id=job.id if job is not None else None,
            )
            insert_version(db, version)
            if job is not None:
                db.execute("UPDATE jobs SET version = ? WHERE id = ?", (version.version, job.id))
                self._release(db, job.id, JobStatus.SUCCEEDED)
        return version

    def version(self, tenant: str, name: str, version: int | None) -> PrefixVersion | None:
        with self._file.read() as db:
            row = db.execute(
                "SELECT * FROM versions WHERE tenant = ? AND name = ? AND version = coalesce(?, version)"
                " ORDER BY version DESC LIMIT 1",
                (tenant, name, version),
            ).fetchone()
        return to_version(row) if row is not None else None

    def current_versions(self, tenant: str, after: str, limit: int) -> list[PrefixVersion]:
        with self._file.read() as db:
            rows = db.execute(
                "SELECT * FROM versions AS own WHERE tenant = ? AND name > ? AND version ="
                " (SELECT max(version) FROM versions WHERE tenant = own.tenant AND name = own.name)"
                " ORDER BY name LIMIT ?",
                (tenant, after, limit),
            ).fetchall()
        return [to_version(row) for row in rows]

    def ever_published(self, tenant: str, name: str) -> bool:
        with self._file.read() as db:
            row = db.execute("SELECT 1 FROM names WHERE tenant = ? AND name = ?", (tenant, name)).fetchone()
        return row is not None

    def delete(self, tenant: str, name: str, version: int | None) -> list[PrefixVersion]:
        with self._file.write() as db:
            rows = db.execute(
                "DELETE FROM versions WHERE tenant = ? AND name = ? AND version = coalesce(?, version) RETURNING *",
                (tenant, name, version),
            ).fetchall()
        return sorted(map(to_version, rows), key=lambda removed: removed.version)

    def digests(self) -> set[str]:
        with self._file.read() as db:
            rows = db.execute(
                "SELECT digest FROM versions UNION SELECT json_extract(spec, '$.data_digest') FROM jobs"
            ).fetchall()
        return {digest for (digest,) in rows}

    # jobs

    def enqueue(self, job_id: str, tenant: str, name: str, spec: TrainingSpec) -> TrainingJob:
        job = TrainingJob(job_id, tenant, name, spec, JobStatus.QUEUED, created_at=self._clock())
        with self._file.write() as db:
            insert_job(db, job)
        return job

    def claim(self, worker: str, lease_seconds: float) -> TrainingJob | None:
        now = self._clock()
        with self._file.write() as db:
            self._end_hopeless(db, now)
            row = db.execute(
                "SELECT id FROM jobs WHERE status = 'queued' OR (status = 'running' AND lease_until <= :now) ORDER BY"
                " (SELECT count(*) FROM jobs AS busy"
                "  WHERE busy.status = 'running' AND busy.tenant = jobs.tenant AND busy.lease_until > :now),"
                " number LIMIT 1",
                {"now": now},
            ).fetchone()
            if row is None:
                return None
            db.execute(
                "UPDATE jobs SET status = 'running', attempt = attempt + 1, fence = fence + 1, worker = :worker,"
                " lease_until = :lease_until, started_at = coalesce(started_at, :now) WHERE id = :id",
                {"worker": worker, "lease_until": now + lease_seconds, "now": now, "id": row["id"]},
            )
            return _read_job(db, row["id"])

    def heartbeat(self, job: TrainingJob, lease_seconds: float, progress: dict[str, Any]) -> Heartbeat:
        with self._file.write() as db:
            current = _check_owned(db, job)
            db.execute(
                "UPDATE jobs SET lease_until = ?, progress = ? WHERE id = ?",
                (self._clock() + lease_seconds, json.dumps(progress), job.id),
            )
        return Heartbeat(current.cancel_requested)

    def finish(self, job: TrainingJob, status: JobStatus, error: JobError | None) -> TrainingJob:
        if status not in TRANSITIONS[JobStatus.RUNNING]:
            raise Conflict(f"a running job cannot become {status}")
        with self._file.write() as db:
            current = _check_owned(db, job)
            if current.cancel_requested and not status.is_final:
                status = JobStatus.CANCELLED
            self._release(db, job.id, status, error)
            return _read_job(db, job.id)

    def request_cancel(self, tenant: str, job_id: str) -> TrainingJob:
        with self._file.write() as db:
            row = db.execute("SELECT * FROM jobs WHERE tenant = ? AND id = ?", (tenant, job_id)).fetchone()
            if row is None:
                raise JobNotFound(f"no job {job_id[:80]!r}")
            job = to_job(row)
            if job.status.is_final:
                raise Conflict(f"job {job_id} is already {job.status}")
            db.execute("UPDATE jobs SET cancel_requested = 1 WHERE id = ?", (job_id,))
            if job.status is not JobStatus.RUNNING:
                self._release(db, job_id, JobStatus.CANCELLED)
            return _read_job(db, job_id)

    def job(self, tenant: str, job_id: str) -> TrainingJob | None:
        with self._file.read() as db:
            row = db.execute("SELECT * FROM jobs WHERE tenant = ? AND id = ?", (tenant, job_id)).fetchone()
        return to_job(row) if row is not None else None

    def jobs(self, tenant: str, after: str | None, limit: int) -> list[TrainingJob]:
        with self._file.read() as db:
            rows = db.execute(
                "SELECT * FROM jobs WHERE tenant = :tenant AND (:after IS NULL"
                " OR number < (SELECT number FROM jobs WHERE tenant = :tenant AND id = :after))"
                " ORDER BY number DESC LIMIT :limit",
                {"tenant": tenant, "after": after, "limit": limit},
            ).fetchall()
        return [to_job(row) for row in rows]

    def job_counts(self) -> dict[JobStatus, int]:
        with self._file.read() as db:
            rows = db.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall()
        return dict.fromkeys(JobStatus, 0) | {JobStatus(status): count for status, count in rows}

    def add_event(self, job: TrainingJob, kind: str, data: dict[str, Any]) -> None:
        with self._file.write() as db:
            _check_owned(db, job)
            db.execute(
                "INSERT INTO events SELECT :job_id, coalesce(max(sequence), 0) + 1, :now, :kind, :data"
                " FROM events WHERE job_id = :job_id",
                {"job_id": job.id, "now": self._clock(), "kind": kind, "data": json.dumps(data)},
            )

    def events(self, tenant: str, job_id: str, after: int, limit: int) -> list[JobEvent]:
        with self._file.read() as db:
            rows = db.execute(
                "SELECT events.* FROM events JOIN jobs ON jobs.id = events.job_id"
                " WHERE jobs.tenant = ? AND job_id = ? AND sequence > ? ORDER BY sequence LIMIT ?",
                (tenant, job_id, after, limit),
            ).fetchall()
        return [to_event(row) for row in rows]

    # keys

    def add_key(self, key: ApiKey) -> None:
        with self._file.write() as db:
            insert_key(db, key)

    def key(self, key_id: str) -> ApiKey | None:
        with self._file.read() as db:
            row = db.execute("SELECT * FROM keys WHERE id = ?", (key_id,)).fetchone()
        return to_key(row) if row is not None else None

    def keys(self) -> list[ApiKey]:
        with self._file.read() as db:
            rows = db.execute("SELECT * FROM keys ORDER BY created_at, rowid").fetchall()
        return [to_key(row) for row in rows]

    def remove_key(self, key_id: str) -> bool:
        with self._file.write() as db:
            return db.execute("DELETE FROM keys WHERE id = ?", (key_id,)).rowcount > 0

    def ping(self) -> None:
        with self._file.read() as db:
            db.execute("SELECT count(*) FROM names").fetchone()

    def close(self) -> None:
        self._file.close()

    def _release(self, db: sqlite3.Connection, job_id: str, status: JobStatus, error: JobError | None = None) -> None:
        db.execute(
            "UPDATE jobs SET status = :status, error = :error, finished_at = :finished_at, lease_until = NULL,"
            " attempt = attempt - :unused WHERE id = :id",
            {
                "id": job_id,
                "status": status,
                "error": json.dumps({"code": error.code, "message": error.message}) if error is not None else None,
                "finished_at": self._clock() if status.is_final else None,
                # a worker that stops in good order has not failed; only attempts that ended badly count
                "unused": 0 if status.is_final else 1,
            },
        )

    def _end_hopeless(self, db: sqlite3.Connection, now: float) -> None:
        lost = JobError("worker_lost", f"the worker stopped answering in each of {MAX_ATTEMPTS} attempts")
        rows = db.execute(
            "SELECT id, cancel_requested FROM jobs WHERE status = 'running' AND lease_until <= ?"
            " AND (cancel_requested OR attempt >= ?)",
            (now, MAX_ATTEMPTS),
        ).fetchall()
        for row in rows:
            if row["cancel_requested"]:
                self._release(db, row["id"], JobStatus.CANCELLED)
            else:
                self._release(db, row["id"], JobStatus.FAILED, lost)


def _next_version(db: sqlite3.Connection, tenant: str, name: str) -> int:
    db.execute(
        "INSERT INTO names (tenant, name, last_version) VALUES (?, ?, 1)"
        " ON CONFLICT DO UPDATE SET last_version = last_version + 1",
        (tenant, name),
    )
    row = db.execute("SELECT last_version FROM names WHERE tenant = ? AND name = ?", (tenant, name)).fetchone()
    return int(row["last_version"])


def _read_job(db: sqlite3.Connection, job_id: str) -> TrainingJob:
    return to_job(db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone())


def _check_owned(db: sqlite3.Connection, job: TrainingJob) -> TrainingJob:
    row = db.execute(
        "SELECT * FROM jobs WHERE id = ? AND fence = ? AND status = 'running'", (job.id, job.fence)
    ).fetchone()
    if row is None:
        raise LeaseLost(f"job {job.id} no longer belongs to this worker")
    return to_job(row)
