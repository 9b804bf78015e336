"""What each tenant has, counted as it changes, and whether it may have more."""

from __future__ import annotations

import dataclasses

from prefix_store import layout
from prefix_store.backends.base import Transaction, View
from prefix_store.errors import QuotaExceeded
from prefix_store.jobs import JobStatus
from prefix_store.tenants import Quotas, Usage


def read(view: View, tenant: str) -> Usage:
    """What the tenant has now."""
    return Usage(**(view.get(layout.usage(tenant)) or {}))


def add(transaction: Transaction, tenant: str, *, prefixes: int = 0, versions: int = 0, size_bytes: int = 0) -> None:
    """Counts what came, or with negative numbers what went. Raises QuotaExceeded for what came."""
    before = read(transaction, tenant)
    after = dataclasses.replace(
        before,
        prefixes=before.prefixes + prefixes,
        versions=before.versions + versions,
        bytes=before.bytes + size_bytes,
    )
    allowed = quotas(transaction, tenant)
    _check("prefixes", prefixes, after.prefixes, allowed.prefixes)
    _check("bytes", size_bytes, after.bytes, allowed.bytes)
    _write(transaction, tenant, after)


def add_job(transaction: Transaction, tenant: str) -> int:
    """Counts a new job, which is queued, and returns its number. Raises QuotaExceeded."""
    before = read(transaction, tenant)
    jobs = {**before.jobs, JobStatus.QUEUED.value: before.jobs.get(JobStatus.QUEUED, 0) + 1}
    after = dataclasses.replace(before, last_job=before.last_job + 1, jobs=jobs)
    _check("jobs", 1, after.unfinished_jobs, quotas(transaction, tenant).jobs)
    _write(transaction, tenant, after)
    return after.last_job


def move_job(transaction: Transaction, tenant: str, before: JobStatus, after: JobStatus) -> None:
    """Counts a job's change of state."""
    usage = read(transaction, tenant)
    jobs = dict(usage.jobs)
    jobs[before.value] = jobs.get(before, 0) - 1
    jobs[after.value] = jobs.get(after, 0) + 1
    _write(transaction, tenant, dataclasses.replace(usage, jobs=jobs))


def quotas(view: View, tenant: str) -> Quotas:
    """What the tenant may have; no bounds for one that nobody has set any for."""
    return Quotas(**(view.get(layout.tenant(tenant)) or {}).get("quotas", {}))


def _check(what: str, more: int, total: int, most: int | None) -> None:
    if more > 0 and most is not None and total > most:
        raise QuotaExceeded(f"this tenant may have {most} {what}; this would make it {total}", param=what)


def _write(transaction: Transaction, tenant: str, usage: Usage) -> None:
    transaction.put(layout.usage(tenant), dataclasses.asdict(usage))
