"""Tenants: their quotas, what they have, and how all of it is erased."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

from prefix_store import audit, layout, usage
from prefix_store.audit import LOCAL
from prefix_store.backends.base import Backend, Transaction, walk
from prefix_store.errors import Conflict, InvalidRequest, NotFound
from prefix_store.name_records import read_name, write_name
from prefix_store.prefix import check_name
from prefix_store.tenants import Quotas, Tenant, Usage

# Records a transaction erases at most, so that others need not wait long.
BATCH = 500


class TenantStore:
    """All tenants. One comes to be with its first key; without quotas it has no bounds."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def create(self, name: str, by: str = LOCAL) -> Tenant:
        """Makes a tenant. Raises InvalidName, Conflict if there is one."""
        check_name(name, "tenant")

        def work(transaction: Transaction) -> Tenant:
            if transaction.get(layout.tenant(name)) is not None:
                raise Conflict(f"there is a tenant {name!r} already")
            audit.record(transaction, by, name, "tenant.create", name)
            return ensure(transaction, name)

        return self._backend.write(work)

    def all(self) -> Sequence[Tenant]:
        """Every tenant, in order of name."""
        with self._backend.view() as view:
            return [_to_tenant(name, data) for name, data in view.scan("tenant/")]

    def names(self) -> list[str]:
        """Every tenant that was made, or has something: in open mode there is one that nobody made."""
        with self._backend.view() as view:
            return sorted({key for folder in ("tenant/", "usage/") for key, _ in view.scan(folder)})

    def quotas(self, name: str) -> Quotas:
        """What a tenant may have; no bounds for one that nobody has set any for."""
        with self._backend.view() as view:
            return usage.quotas(view, name)

    def usage(self, name: str) -> Usage:
        """What a tenant has."""
        with self._backend.view() as view:
            return usage.read(view, name)

    def set_quotas(self, name: str, changes: dict[str, int | None], by: str = LOCAL) -> Quotas:
        """Changes some of a tenant's quotas; None takes a bound away. Raises NotFound, InvalidRequest."""
        known = {field.name for field in dataclasses.fields(Quotas)}
        if unknown := sorted(set(changes) - known):
            raise InvalidRequest(f"unknown quota {unknown[0][:40]!r}; known are {', '.join(sorted(known))}")

        def work(transaction: Transaction) -> Quotas:
            if not any(transaction.get_many([layout.tenant(name), layout.usage(name)])):
                raise NotFound(f"there is no tenant {name[:80]!r}")
            tenant = ensure(transaction, name)
            quotas = dataclasses.replace(tenant.quotas, **changes)
            transaction.put(
                layout.tenant(name), {"created_at": tenant.created_at, "quotas": dataclasses.asdict(quotas)}
            )
            audit.record(transaction, by, name, "tenant.quotas", name)
            return quotas

        return self._backend.write(work)

    def erase(self, name: str, by: str = LOCAL) -> int:
        """Removes every record of a tenant and returns how many; `collect` then removes the blobs.

        Its keys go first, so that it can do nothing meanwhile. The audit log forgets it as well, but for one line
        with a hash of its name. Interrupted, it is finished by doing it again. Raises InvalidName.
        """
        check_name(name, "tenant")
        hashed = hashlib.sha256(name.encode()).hexdigest()[:16]
        self._unshare(name)
        erased = 0
        while found := sum(self._remove(stage(self._backend, name)) for stage in STAGES):
            erased += found  # and again, for what requests that had begun have added meanwhile
            self._unshare(name)
        self._rename_in_audit(name, hashed)
        if erased:
            self._backend.write(lambda transaction: audit.record(transaction, by, "", "tenant.erase", hashed))
        return erased

    def _unshare(self, reader: str) -> None:
        """Takes the tenant off what others share with it: a later one of that name is somebody else."""

        def work(transaction: Transaction, tenant: str, name: str) -> None:
            record = read_name(transaction, tenant, name)
            if record is not None:
                left = [other for other in record.shared if other != reader]
                write_name(transaction, tenant, name, dataclasses.replace(record, shared=left))
            transaction.delete(layout.shared(reader, tenant, name))

        for key, _ in walk(self._backend, layout.shared(reader)):
            tenant, _, name = key.partition("/")
            self._backend.write(partial(work, tenant=tenant, name=name))

    def _remove(self, keys: Iterator[str]) -> int:
        removed = 0
        while batch := list(islice(keys, BATCH)):
            self._backend.write(partial(_delete, batch))
            removed += len(batch)
        return removed

    def _rename_in_audit(self, name: str, hashed: str) -> None:
        """Others' lines that name the tenant as somebody they share with keep only the hash."""
        word = re.compile(rf"(?<![a-z0-9._-]){re.escape(name)}(?![a-z0-9._-])")
        for key, line in walk(self._backend, "audit/"):
            if line["action"] == audit.SHARE and word.search(line["target"]):
                what, given, readers = line["target"].partition(audit.SHARED_WITH)
                changed = {**line, "target": what + given + word.sub(hashed, readers)}
                self._backend.write(partial(_put, f"audit/{key}", changed))


def ensure(transaction: Transaction, name: str) -> Tenant:
    """The tenant, made if there is none."""
    data = transaction.get(layout.tenant(name))
    if data is None:
        data = {"created_at": transaction.now, "quotas": {}}
        transaction.put(layout.tenant(name), data)
    return _to_tenant(name, data)


def _to_tenant(name: str, data: dict[str, Any]) -> Tenant:
    return Tenant(name, data["created_at"], Quotas(**data["quotas"]))


def _put(key: str, value: Any, transaction: Transaction) -> None:
    transaction.put(key, value)


def _delete(keys: list[str], transaction: Transaction) -> None:
    for key in keys:
        transaction.delete(key)


def _access(backend: Backend, tenant: str) -> Iterator[str]:
    """What lets it act, and lets what it has begun end well."""
    yield from (f"key/{key}" for key, data in walk(backend, "key/") if data["tenant"] == tenant)
    yield from (f"blob/{key}" for key, entry in walk(backend, "blob/") if entry.get("tenant") == tenant)


def _jobs(backend: Backend, tenant: str) -> Iterator[str]:
    """Before their histories, to which nothing is added then."""
    for folder in ("queued", "running"):
        yield from (f"{folder}/{tenant}/{key}" for key, _ in walk(backend, f"{folder}/{tenant}/"))
    for _, job_id in walk(backend, f"jobs/{tenant}/"):
        with backend.view() as view:
            job = view.get(layout.job(job_id))
        if job is not None:
            yield from (layout.blob_of_job(job["spec"]["data_digest"], job_id), layout.job(job_id))


def _rest(backend: Backend, tenant: str) -> Iterator[str]:
    for number, job_id in walk(backend, f"jobs/{tenant}/"):
        yield from (f"event/{job_id}/{key}" for key, _ in walk(backend, f"event/{job_id}/"))
        yield f"jobs/{tenant}/{number}"
    for folder in ("name", "once", "retired"):
        yield from (f"{folder}/{tenant}/{key}" for key, _ in walk(backend, f"{folder}/{tenant}/"))
    for file_id, data in walk(backend, layout.file(tenant)):
        yield from (layout.blob_of_file(data["digest"], file_id), layout.file(tenant, file_id))
    yield from (f"shared/{key}" for key, _ in walk(backend, "shared/") if key.split("/")[1] == tenant)
    for folder in ("version", "tombstone"):
        for path, data in walk(backend, f"{folder}/{tenant}/"):
            yield f"blob/{data['digest']}/version/{tenant}/{path}"
            if data.get("expires_at") is not None:
                yield f"expiry/{layout.milliseconds(data['expires_at'])}/{tenant}/{path}"
            yield f"{folder}/{tenant}/{path}"
    yield from (f"audit/{key}" for key, data in walk(backend, "audit/") if data["tenant"] == tenant)
    with backend.view() as view:
        own = [layout.usage(tenant), layout.tenant(tenant), layout.turn(tenant)]
        yield from (key for key, value in zip(own, view.get_many(own), strict=True) if value is not None)


# What is erased of a tenant; a stage begins when the one before it is done.
STAGES: tuple[Callable[[Backend, str], Iterator[str]], ...] = (_access, _jobs, _rest)
