"""The tables of the SQLite backend, and how their rows become records."""

from __future__ import annotations

import dataclasses
import json
import sqlite3

from prefix_store.jobs import JobError, JobEvent, JobStatus, TrainingJob, TrainingSpec
from prefix_store.prefix import Method, PrefixVersion
from prefix_store.tenants import ApiKey

SCHEMA_VERSION = 1
# Columns of versions, events and keys are the fields of PrefixVersion, JobEvent and ApiKey; the current version of a
# name is its highest one. A name stays after its versions are deleted, so that no number is used twice.
SCHEMA = """
CREATE TABLE names (
    tenant TEXT NOT NULL, name TEXT NOT NULL, last_version INTEGER NOT NULL,
    PRIMARY KEY (tenant, name)
) WITHOUT ROWID;
CREATE TABLE versions (
    tenant TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, method TEXT NOT NULL,
    virtual_tokens INTEGER NOT NULL, size_bytes INTEGER NOT NULL, created_at REAL NOT NULL, base_digest TEXT,
    job_id TEXT UNIQUE,
    PRIMARY KEY (tenant, name, version)
) WITHOUT ROWID;
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, name TEXT NOT NULL, spec TEXT NOT NULL,
    status TEXT NOT NULL, created_at REAL NOT NULL, attempt INTEGER NOT NULL DEFAULT 0,
    fence INTEGER NOT NULL DEFAULT 0, worker TEXT, lease_until REAL, cancel_requested INTEGER NOT NULL DEFAULT 0,
    started_at REAL, finished_at REAL, version INTEGER, error TEXT, progress TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX jobs_by_status ON jobs (status, tenant);
CREATE INDEX jobs_by_tenant ON jobs (tenant, number);
CREATE TABLE events (
    job_id TEXT NOT NULL, sequence INTEGER NOT NULL, created_at REAL NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL,
    PRIMARY KEY (job_id, sequence)
) WITHOUT ROWID;
CREATE TABLE keys (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, secret_hash TEXT NOT NULL, scopes TEXT NOT NULL, created_at REAL NOT NULL
)
"""


def insert_version(db: sqlite3.Connection, version: PrefixVersion) -> None:
    """Adds the row of a version."""
    _insert(db, "versions", dataclasses.asdict(version))


def to_version(row: sqlite3.Row) -> PrefixVersion:
    """A row of `versions`."""
    return PrefixVersion(**{**dict(row), "method": Method(row["method"])})


def insert_job(db: sqlite3.Connection, job: TrainingJob) -> None:
    """Adds the row of a job that nobody has claimed yet."""
    fields = {key: getattr(job, key) for key in ("id", "tenant", "name", "status", "created_at")}
    _insert(db, "jobs", {**fields, "spec": json.dumps(job.spec.to_json())})


def to_job(row: sqlite3.Row) -> TrainingJob:
    """A row of `jobs`."""
    fields = dict(row)
    del fields["number"]
    fields["spec"] = TrainingSpec.from_json(json.loads(row["spec"]))
    fields["status"] = JobStatus(row["status"])
    fields["cancel_requested"] = bool(row["cancel_requested"])
    fields["error"] = JobError(**json.loads(row["error"])) if row["error"] is not None else None
    fields["progress"] = json.loads(row["progress"])
    return TrainingJob(**fields)


def to_event(row: sqlite3.Row) -> JobEvent:
    """A row of `events`."""
    return JobEvent(**{**dict(row), "data": json.loads(row["data"])})


def insert_key(db: sqlite3.Connection, key: ApiKey) -> None:
    """Adds the row of an API key."""
    _insert(db, "keys", {**dataclasses.asdict(key), "scopes": " ".join(sorted(key.scopes))})


def to_key(row: sqlite3.Row) -> ApiKey:
    """A row of `keys`."""
    return ApiKey(**{**dict(row), "scopes": frozenset(row["scopes"].split())})


def _insert(db: sqlite3.Connection, table: str, fields: dict[str, object]) -> None:
    columns, marks = ", ".join(fields), ", ".join("?" * len(fields))
    db.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", tuple(fields.values()))
