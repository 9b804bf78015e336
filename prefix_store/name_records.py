"""What a prefix's name and its versions leave in the records, and the steps that change them inside a transaction."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefix_store import audit, layout, usage
from prefix_store.backends.base import Transaction, View
from prefix_store.errors import Conflict, LeaseLost, PreconditionFailed, PrefixNotFound
from prefix_store.jobs import TrainingJob
from prefix_store.prefix import PrefixManifest, PrefixRef, PrefixVersion

# In the place of a digest: what must not be there yet.
ABSENT = "absent"


@dataclass(frozen=True)
class NameRecord:
    """What a name stands for: its last version ever, its current one, its aliases, and who else may use it.

    `shared` holds tenants, or `*` for all of them.
    """

    last: int
    current: int
    aliases: dict[str, int] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)

    def number(self, ref: PrefixRef) -> int | None:
        """The version that a reference to this name means; None for an alias that it does not have."""
        if ref.version is not None:
            return ref.version
        return self.aliases.get(ref.alias) if ref.alias is not None else self.current

    def aliases_of(self, number: int) -> list[str]:
        """The aliases of a version, in order."""
        return sorted(alias for alias, meant in self.aliases.items() if meant == number)


@dataclass(frozen=True)
class Draft:
    """A version before it has a number. `hold` is the key of the hold on its blob."""

    manifest: PrefixManifest
    digest: str
    size_bytes: int
    hold: str
    metadata: dict[str, str] = field(default_factory=dict)
    lifetime: float | None = None


def remove_versions(
    transaction: Transaction,
    record: NameRecord,
    removed: list[PrefixVersion],
    left: int | None,
    by: str,
    action: str,
) -> None:
    """Takes versions of a name away; each leaves a tombstone. `left`: the highest that stays; None: the name goes."""
    gone = {version.version for version in removed}
    tenant, name = removed[0].tenant, removed[0].name
    for version in removed:
        transaction.delete(layout.version(tenant, name, version.version))
        remove_expiry(transaction, version)
        entry = {"digest": version.digest, "at": transaction.now}
        transaction.put(layout.tombstone(tenant, name, version.version), entry)
        audit.record(transaction, by, tenant, action, label(version), version.digest)
    if left is not None:
        aliases = {alias: number for alias, number in record.aliases.items() if number not in gone}
        current = record.current if record.current not in gone else left
        write_name(transaction, tenant, name, dataclasses.replace(record, aliases=aliases, current=current))
    else:
        transaction.delete(layout.name(tenant, name))
        transaction.put(layout.retired(tenant, name), {"last": record.last})
        for reader in record.shared:
            transaction.delete(layout.shared(reader, tenant, name))
    size = sum(version.size_bytes for version in removed)
    usage.add(transaction, tenant, prefixes=-1 if left is None else 0, versions=-len(removed), size_bytes=-size)


def write_version(transaction: Transaction, version: PrefixVersion) -> None:
    """Writes a version's records besides its name's."""
    place = version.tenant, version.name, version.version
    transaction.put(layout.version(*place), version.to_json())
    transaction.put(layout.blob_of_version(version.digest, *place), {})
    if version.expires_at is not None:
        transaction.put(layout.expiry(version.expires_at, *place), {})


def all_versions(view: View, tenant: str, name: str) -> list[PrefixVersion]:
    """Every version of a name, in order."""
    return [PrefixVersion.from_json(data) for _, data in view.scan(layout.versions(tenant, name))]


def highest_besides(view: View, version: PrefixVersion) -> int | None:
    """The highest number of the version's name but for its own; None if it is the only one."""
    newest = view.scan(layout.versions(version.tenant, version.name), limit=2, descending=True)
    numbers = [layout.number_of(key) for key, _ in newest]
    return next((number for number in numbers if number != version.version), None)


def not_found(ref: PrefixRef) -> PrefixNotFound:
    """The same for all that cannot be found."""
    return PrefixNotFound(f"no prefix {ref}", param="prefix_id")


def published_before(view: View, job: TrainingJob) -> PrefixVersion:
    """The version that a succeeded job has published. Raises LeaseLost if it was deleted since."""
    version = read_version(view, job.tenant, job.name, job.version) if job.version is not None else None
    if version is None:
        raise LeaseLost(f"job {job.id} was published and deleted since")
    return version


def add_version(
    transaction: Transaction,
    tenant: str,
    name: str,
    draft: Draft,
    if_match: str | None,
    job: TrainingJob | None,
) -> PrefixVersion:
    """Writes the next version of `tenant/name` and makes it current. Raises PreconditionFailed, QuotaExceeded."""
    record = read_name(transaction, tenant, name)
    check_match(if_match, meant(transaction, record, PrefixRef(tenant, name)) if record is not None else None)
    retired = transaction.get(layout.retired(tenant, name)) or {"last": 0}
    last = record.last if record is not None else retired["last"]
    now = transaction.now
    version = PrefixVersion(
        tenant=tenant,
        name=name,
        version=last + 1,
        digest=draft.digest,
        method=draft.manifest.method,
        virtual_tokens=draft.manifest.virtual_tokens,
        size_bytes=draft.size_bytes,
        created_at=now,
        base_digest=draft.manifest.base_digest,
        job_id=job.id if job is not None else None,
        metadata=draft.metadata,
        expires_at=now + draft.lifetime if draft.lifetime is not None else None,
    )
    usage.add(transaction, tenant, prefixes=0 if record is not None else 1, versions=1, size_bytes=version.size_bytes)
    renewed = NameRecord(last + 1, last + 1) if record is None else record
    transaction.delete(layout.retired(tenant, name))
    write_name(transaction, tenant, name, dataclasses.replace(renewed, last=last + 1, current=last + 1))
    write_version(transaction, version)
    return version


def read_name(view: View, tenant: str, name: str) -> NameRecord | None:
    """What a name stands for, or None."""
    data = view.get(layout.name(tenant, name))
    return NameRecord(**data) if data is not None else None


def write_name(transaction: Transaction, tenant: str, name: str, record: NameRecord) -> None:
    """Writes what a name stands for."""
    transaction.put(layout.name(tenant, name), dataclasses.asdict(record))


def read_version(view: View, tenant: str, name: str, number: int) -> PrefixVersion | None:
    """That version, expired or not, or None."""
    data = view.get(layout.version(tenant, name, number))
    return PrefixVersion.from_json(data) if data is not None else None


def existing(view: View, ref: PrefixRef) -> tuple[NameRecord, PrefixVersion]:
    """A name and the version of it that a reference means. Raises PrefixNotFound, also for one that has expired."""
    record = read_name(view, ref.tenant, ref.name)
    version = meant(view, record, ref) if record is not None else None
    if record is None or version is None:
        raise not_found(ref)
    return record, version


def meant(view: View, record: NameRecord, ref: PrefixRef) -> PrefixVersion | None:
    """The version that a reference to the record's name means now; None for one that is not there or has expired.

    A bare name means its current version and, once that has expired, the highest that has not, as the collector will
    write it down.
    """
    number = record.number(ref)
    version = read_version(view, ref.tenant, ref.name, number) if number is not None else None
    if version is None or not version.has_expired(view.now):
        return version
    if ref.version is not None or ref.alias is not None:
        return None
    return next(reversed(live_versions(view, ref.tenant, ref.name)), None)


def live_versions(view: View, tenant: str, name: str) -> list[PrefixVersion]:
    """Every version of a name that has not expired, in order."""
    return [version for version in all_versions(view, tenant, name) if not version.has_expired(view.now)]


def before_current(view: View, tenant: str, name: str) -> int:
    """The highest version below the current one. Raises PrefixNotFound, Conflict if there is none."""
    _, current = existing(view, PrefixRef(tenant, name))
    lower = [version.version for version in live_versions(view, tenant, name) if version.version < current.version]
    if not lower:
        raise Conflict(f"{label(current)} is the lowest version that there is")
    return max(lower)


def current_versions(view: View, names: list[tuple[str, str]]) -> list[PrefixVersion]:
    """What these bare names mean now, each a tenant and a name, in their order; what is gone is left out."""
    records: list[Mapping[str, Any] | None] = view.get_many([layout.name(*name) for name in names])
    there = [(name, NameRecord(**data)) for name, data in zip(names, records, strict=True) if data is not None]
    found = view.get_many([layout.version(*name, record.current) for name, record in there])
    versions = []
    for (name, record), data in zip(there, found, strict=True):
        version = PrefixVersion.from_json(data) if data is not None else None
        if version is not None and version.has_expired(view.now):
            version = meant(view, record, PrefixRef(*name))
        versions += [version] if version is not None else []
    return versions


def may_read(record: NameRecord, ref: PrefixRef, reader: str) -> bool:
    """Whether the tenant `reader` may use the name that a reference is to."""
    return reader == ref.tenant or bool({reader, layout.EVERYONE} & set(record.shared))


def remove_expiry(transaction: Transaction, version: PrefixVersion) -> None:
    """Forgets when a version ends."""
    if version.expires_at is not None:
        place = version.tenant, version.name, version.version
        transaction.delete(layout.expiry(version.expires_at, *place))


def check_match(if_match: str | None, version: PrefixVersion | None) -> None:
    """Raises PreconditionFailed unless the version is what the caller means; `*` means any, None asks nothing."""
    if if_match == ABSENT:
        if version is not None:
            raise PreconditionFailed(f"If-None-Match: {label(version)} is there already")
    elif if_match is not None and (version is None or if_match not in ("*", version.digest)):
        now = f"is now {version.digest}" if version is not None else "does not exist"
        raise PreconditionFailed(f"If-Match: expected {if_match[:64]}; the current version {now}")


def check_free(record: NameRecord, removed: list[PrefixVersion], *, whole: bool) -> None:
    """Raises Conflict for a pinned version, or one that an alias means unless the `whole` name goes."""
    for version in removed:
        if version.pinned:
            raise Conflict(f"{label(version)} is pinned; unpin it first")
        if not whole and (aliases := record.aliases_of(version.version)):
            raise Conflict(f"{label(version)} has the alias {', '.join(aliases)}; move or remove it first")


def label(version: PrefixVersion) -> str:
    """How the audit log and messages name a version."""
    return f"{version.name}@{version.version}"
