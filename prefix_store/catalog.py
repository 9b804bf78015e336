"""The records of prefixes: names, versions, aliases, whom a name is shared with. Knows no file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

from prefix_store import audit, holds, job_records, layout
from prefix_store.backends.base import Backend, Transaction
from prefix_store.errors import InvalidRequest, StoreCorrupt
from prefix_store.jobs import JobStatus, TrainingJob
from prefix_store.name_records import (
    Draft,
    NameRecord,
    add_version,
    all_versions,
    before_current,
    check_free,
    check_match,
    current_versions,
    existing,
    highest_besides,
    label,
    may_read,
    meant,
    not_found,
    published_before,
    read_name,
    read_version,
    remove_expiry,
    remove_versions,
    write_name,
    write_version,
)
from prefix_store.prefix import PrefixRef, PrefixVersion

PAGE = 200


class Catalog:
    """Finds and changes the records of prefixes. Every change is atomic and audited; `by` says who makes it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def publish(
        self,
        tenant: str,
        name: str,
        draft: Draft,
        job: TrainingJob | None,
        if_match: str | None,
        by: str,
        also: Callable[[Transaction, PrefixVersion], None] | None = None,
    ) -> PrefixVersion:
        """Adds the next version of `tenant/name` and makes it current.

        With a job: refused with LeaseLost unless the job is running under `job.fence`, marks the job succeeded in the
        same transaction, and returns the version already published when the job was published before. `if_match`: the
        digest that the current version must have, else PreconditionFailed. Raises QuotaExceeded.
        """

        def work(transaction: Transaction) -> PrefixVersion:
            holds.release(transaction, draft.hold)
            record = job_records.find(transaction, job.id) if job is not None else None
            if job is not None and record is not None and record.job.status is JobStatus.SUCCEEDED:
                return published_before(transaction, record.job)
            if job is not None:
                record = job_records.owned(transaction, job)
            version = add_version(transaction, tenant, name, draft, if_match, job)
            if record is not None:
                job_records.release(transaction, record, JobStatus.SUCCEEDED, version=version.version)
            audit.record(transaction, by, tenant, "prefix.publish", label(version), version.digest)
            if also is not None:
                also(transaction, version)
            return version

        return self._backend.write(work)

    def find(self, ref: PrefixRef, reader: str) -> PrefixVersion | None:
        """The version that a reference means now to this tenant; None unless it is there and the tenant may use it."""
        before: NameRecord | None = None
        with self._backend.view() as view:
            while True:
                record = read_name(view, ref.tenant, ref.name)
                number = record.number(ref) if record is not None and may_read(record, ref, reader) else None
                if record is None or number is None:
                    return None
                version = read_version(view, ref.tenant, ref.name, number)
                if version is not None:
                    return version if not version.has_expired(view.now) else meant(view, record, ref)
                if ref.version is not None:
                    return None
                if record == before:
                    raise StoreCorrupt(f"{ref} means version {number}, which is missing")
                before = record  # most likely it was replaced and deleted between the two reads

    def name(self, tenant: str, name: str) -> NameRecord | None:
        """What a name stands for, or None."""
        with self._backend.view() as view:
            return read_name(view, tenant, name)

    def page(
        self, tenant: str, after: str, limit: int, wanted: Callable[[PrefixVersion], bool] = lambda version: True
    ) -> list[PrefixVersion]:
        """Current versions of the tenant's names greater than `after`, in name order; only those that are wanted."""
        return self._page(layout.name(tenant), after, limit, wanted, lambda key: (tenant, key))

    def page_shared(
        self,
        reader: str,
        after: str,
        limit: int,
        wanted: Callable[[PrefixVersion], bool] = lambda version: True,
    ) -> list[PrefixVersion]:
        """Current versions of what other tenants share with this one, in order of `tenant/name`; only those wanted."""

        def from_others(version: PrefixVersion) -> bool:
            return version.tenant != reader and wanted(version)

        found: dict[str, PrefixVersion] = {}
        for folder in (reader, layout.EVERYONE):
            page = self._page(layout.shared(folder), after, limit, from_others, _split)
            found |= {f"{version.tenant}/{version.name}": version for version in page}
        return [found[key] for key in sorted(found)][:limit]

    def versions(self, tenant: str, name: str, after: int, limit: int) -> list[PrefixVersion]:
        """The name's versions with numbers above `after`, in order."""
        found: list[PrefixVersion] = []
        last = layout.version(tenant, name, after).rpartition("/")[2]
        while len(found) < limit:
            with self._backend.view() as view:
                page = view.scan(layout.versions(tenant, name), after=last, limit=PAGE)
                every = [PrefixVersion.from_json(data) for _, data in page]
                found += [version for version in every if not version.has_expired(view.now)]
            if len(page) < PAGE:
                break
            last = page[-1][0]
        return found[:limit]

    def ever_published(self, tenant: str, name: str) -> bool:
        """Whether the name was ever used, deleted or not."""
        with self._backend.view() as view:
            return any(view.get_many([layout.name(tenant, name), layout.retired(tenant, name)]))

    def make_current(self, tenant: str, name: str, number: int | None, by: str) -> PrefixVersion:
        """Switches what the bare name means, back or forth; None goes back by one. Raises PrefixNotFound, Conflict."""

        def work(transaction: Transaction) -> PrefixVersion:
            wanted = before_current(transaction, tenant, name) if number is None else number
            record, version = existing(transaction, PrefixRef(tenant, name, wanted))
            write_name(transaction, tenant, name, dataclasses.replace(record, current=wanted))
            audit.record(transaction, by, tenant, "prefix.make_current", label(version), version.digest)
            return version

        return self._backend.write(work)

    def set_alias(self, tenant: str, name: str, alias: str, number: int, by: str) -> PrefixVersion:
        """Makes `name@alias` mean a version, from one moment to the next. Raises PrefixNotFound."""

        def work(transaction: Transaction) -> PrefixVersion:
            record, version = existing(transaction, PrefixRef(tenant, name, number))
            aliases = {**record.aliases, alias: number}
            write_name(transaction, tenant, name, dataclasses.replace(record, aliases=aliases))
            audit.record(transaction, by, tenant, "alias.set", f"{label(version)} as {alias}", version.digest)
            return version

        return self._backend.write(work)

    def remove_alias(self, tenant: str, name: str, alias: str, by: str) -> None:
        """Makes `name@alias` mean nothing. Raises PrefixNotFound."""

        def work(transaction: Transaction) -> None:
            record = read_name(transaction, tenant, name)
            if record is None or alias not in record.aliases:
                raise not_found(PrefixRef(tenant, name, alias=alias))
            aliases = {other: number for other, number in record.aliases.items() if other != alias}
            write_name(transaction, tenant, name, dataclasses.replace(record, aliases=aliases))
            audit.record(transaction, by, tenant, "alias.remove", f"{name}@{alias}")

        self._backend.write(work)

    def share(self, tenant: str, name: str, readers: Collection[str], by: str) -> NameRecord:
        """Lets exactly these tenants use the name besides its owner; `*` stands for all. Raises PrefixNotFound."""

        def work(transaction: Transaction) -> NameRecord:
            record = read_name(transaction, tenant, name)
            if record is None:
                raise not_found(PrefixRef(tenant, name))
            changed = dataclasses.replace(record, shared=sorted(readers))
            for reader in record.shared:
                transaction.delete(layout.shared(reader, tenant, name))
            for reader in changed.shared:
                transaction.put(layout.shared(reader, tenant, name), {})
            write_name(transaction, tenant, name, changed)
            target = f"{name}{audit.SHARED_WITH}{', '.join(changed.shared) or '-'}"
            audit.record(transaction, by, tenant, audit.SHARE, target)
            return changed

        return self._backend.write(work)

    def edit(self, ref: PrefixRef, change: Callable[[PrefixVersion, float], PrefixVersion], by: str) -> PrefixVersion:
        """Changes what may change of a version; `change` gets it and the time. Raises PrefixNotFound."""

        def work(transaction: Transaction) -> PrefixVersion:
            _, version = existing(transaction, ref)
            changed = change(version, transaction.now)
            remove_expiry(transaction, version)
            write_version(transaction, changed)
            audit.record(transaction, by, ref.tenant, "prefix.edit", label(version), version.digest)
            return changed

        return self._backend.write(work)

    def delete(self, ref: PrefixRef, if_match: str | None, by: str) -> list[PrefixVersion]:
        """Removes one version, or all of a bare name, and returns what was removed. Numbers are never used again.

        When the current version goes, the highest remaining one becomes current. Raises PrefixNotFound, Conflict for
        what is pinned or has an alias, PreconditionFailed.
        """
        if ref.alias is not None:
            raise InvalidRequest(f"delete a version by its number, not by its alias {ref.alias!r}", param="prefix_id")

        def work(transaction: Transaction) -> list[PrefixVersion]:
            record, version = existing(transaction, ref)
            check_match(if_match, version)
            whole = ref.version is None
            removed = all_versions(transaction, ref.tenant, ref.name) if whole else [version]
            left = None if whole else highest_besides(transaction, version)
            check_free(record, removed, whole=whole)
            remove_versions(transaction, record, removed, left, by, "prefix.delete")
            return removed

        return self._backend.write(work)

    def _page(
        self,
        folder: str,
        after: str,
        limit: int,
        wanted: Callable[[PrefixVersion], bool],
        owner_and_name: Callable[[str], tuple[str, str]],
    ) -> list[PrefixVersion]:
        found: list[PrefixVersion] = []
        while len(found) < limit:
            with self._backend.view() as view:
                keys = [key for key, _ in view.scan(folder, after=after, limit=PAGE)]
                current = current_versions(view, [owner_and_name(key) for key in keys])
                found += filter(wanted, current)
            if len(keys) < PAGE:
                break
            after = keys[-1]
        return found[:limit]


def _split(key: str) -> tuple[str, str]:
    tenant, _, name = key.partition("/")
    return tenant, name
