"""Prefixes as they are kept: versions of names, each with its native file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefix_store import codec, collection, holds, layout
from prefix_store.audit import LOCAL
from prefix_store.backends.base import Backend, Blobs, Transaction
from prefix_store.catalog import Catalog
from prefix_store.errors import InvalidName, InvalidRequest, QuotaExceeded, StoreCorrupt
from prefix_store.jobs import TrainingJob
from prefix_store.name_records import Draft, NameRecord, not_found
from prefix_store.prefix import ALIAS, PrefixManifest, PrefixRef, PrefixVersion, check_metadata, check_name
from prefix_store.tensors import PrefixTensors

LONGEST_LIFETIME = 10 * 366 * 86400.0


class PrefixStore:
    """Versions of prefixes. What a version is never changes. `by` says who makes a change, for the audit log."""

    def __init__(self, backend: Backend, blobs: Blobs) -> None:
        self._backend = backend
        self._blobs = blobs
        self._catalog = Catalog(backend)

    def save(
        self,
        tenant: str,
        name: str,
        manifest: PrefixManifest,
        tensors: PrefixTensors,
        *,
        job: TrainingJob | None = None,
        metadata: dict[str, str] | None = None,
        lifetime: float | None = None,
        if_match: str | None = None,
        by: str = LOCAL,
        also: Callable[[Transaction, PrefixVersion], None] | None = None,
    ) -> PrefixVersion:
        """Adds the next version of `tenant/name` and makes it current; with a job, once and only while it is owned.

        `lifetime`: seconds until it expires. `if_match`: the digest of the current version, `*` for any, or ABSENT.
        `also` is done in the transaction that publishes. Raises InvalidName, InvalidPrefix, InvalidRequest,
        QuotaExceeded, PreconditionFailed, what `also` raises and, with a job, LeaseLost.
        """
        check_name(tenant, "tenant")
        check_name(name)
        notes = check_metadata(metadata or {})
        check_lifetime(lifetime)
        with self._blobs.spool() as path:
            codec.write(manifest, tensors, path)
            digest, size = codec.digest_of(path), path.stat().st_size
            with holds.held(self._backend, tenant, digest) as hold:
                self._blobs.put_file(path, digest)
                draft = Draft(manifest, digest, size, hold, notes, lifetime)
                try:
                    return self._catalog.publish(tenant, name, draft, job, if_match, by, also)
                except QuotaExceeded:
                    collection.expire(self._backend)
                    return self._catalog.publish(tenant, name, draft, job, if_match, by, also)

    def resolve(self, ref: PrefixRef, reader: str | None = None) -> PrefixVersion:
        """The version that a reference means now to `reader`, by default its owner.

        Raises PrefixNotFound, also for one that has expired or that is not shared with the reader.
        """
        found = self._catalog.find(ref, reader if reader is not None else ref.tenant)
        if found is None:
            raise not_found(ref)
        return found

    def read(self, version: PrefixVersion) -> tuple[PrefixManifest, PrefixTensors]:
        """The prefix itself. Raises StoreCorrupt unless its bytes match the digest, PrefixNotFound if it is deleted."""
        with self.file(version) as path:
            return codec.decode(path)

    @contextmanager
    def spool(self) -> Iterator[Path]:
        """A new file beside the stored ones, for what is to be looked at before it is saved. Gone afterwards."""
        with self._blobs.spool() as path:
            yield path

    @contextmanager
    def file(self, version: PrefixVersion) -> Iterator[Path]:
        """The native file, to read. Raises what `read` raises."""
        try:
            with self._blobs.file(version.digest) as path:
                yield path
        except StoreCorrupt:
            self.resolve(version.ref)  # what was deleted since has no file, and nothing is corrupt
            raise

    def describe(self, version: PrefixVersion) -> NameRecord:
        """What the version's name stands for. Raises PrefixNotFound."""
        return self.describe_name(version.tenant, version.name)

    def describe_name(self, tenant: str, name: str) -> NameRecord:
        """What a name stands for. Raises PrefixNotFound."""
        record = self._catalog.name(tenant, name)
        if record is None:
            raise not_found(PrefixRef(tenant, name))
        return record

    def page(
        self,
        tenant: str,
        after: str = "",
        limit: int = 100,
        wanted: Callable[[PrefixVersion], bool] = lambda version: True,
    ) -> list[PrefixVersion]:
        """Current versions of the tenant's names greater than `after`, in name order; only those that are wanted."""
        return self._catalog.page(tenant, after, limit, wanted)

    def page_shared(
        self,
        reader: str,
        after: str = "",
        limit: int = 100,
        wanted: Callable[[PrefixVersion], bool] = lambda version: True,
    ) -> list[PrefixVersion]:
        """Current versions of what others share with a tenant, greater than `after`, in order of `tenant/name`."""
        return self._catalog.page_shared(reader, after, limit, wanted)

    def versions(self, tenant: str, name: str, after: int = 0, limit: int = 100) -> list[PrefixVersion]:
        """The name's versions with numbers above `after`, in order."""
        return self._catalog.versions(tenant, name, after, limit)

    def make_current(self, tenant: str, name: str, number: int | None, by: str = LOCAL) -> PrefixVersion:
        """Switches what the bare name means: back to an older version, or forth; None goes back by one.

        Raises PrefixNotFound, Conflict when there is none to go back to.
        """
        return self._catalog.make_current(tenant, name, number, by)

    def set_alias(self, tenant: str, name: str, alias: str, number: int, by: str = LOCAL) -> PrefixVersion:
        """Makes `name@alias` mean a version, atomically. Raises InvalidName, PrefixNotFound."""
        if not ALIAS.fullmatch(alias):
            raise InvalidName(
                f"an alias must be 1 to 64 of a-z 0-9 . _ -, beginning with a letter; got {alias[:80]!r}", param="alias"
            )
        return self._catalog.set_alias(tenant, name, alias, number, by)

    def remove_alias(self, tenant: str, name: str, alias: str, by: str = LOCAL) -> None:
        """Makes `name@alias` mean nothing. Raises PrefixNotFound."""
        self._catalog.remove_alias(tenant, name, alias, by)

    def share(self, tenant: str, name: str, readers: Collection[str], by: str = LOCAL) -> NameRecord:
        """Lets exactly these tenants use the name besides its owner; `*` is everyone. Raises PrefixNotFound."""
        for reader in readers:
            if reader != layout.EVERYONE:
                check_name(reader, "tenant")
        return self._catalog.share(tenant, name, set(readers) - {tenant}, by)

    def edit(self, ref: PrefixRef, changes: dict[str, Any], by: str = LOCAL) -> PrefixVersion:
        """Changes some of `metadata`, `pinned` and `lifetime` (seconds from now; None for ever) of a version.

        Raises PrefixNotFound, InvalidRequest.
        """
        fields = {name: value for name, value in changes.items() if name != "lifetime"}
        if "metadata" in fields:
            fields["metadata"] = check_metadata(fields["metadata"])
        lifetime = check_lifetime(changes.get("lifetime"))

        def change(version: PrefixVersion, now: float) -> PrefixVersion:
            if "lifetime" in changes:
                fields["expires_at"] = now + lifetime if lifetime is not None else None
            return dataclasses.replace(version, **fields)

        return self._catalog.edit(ref, change, by)

    def delete(self, ref: PrefixRef, if_match: str | None = None, by: str = LOCAL) -> list[PrefixVersion]:
        """Removes one version, or all of a bare name, and returns them.

        Raises PrefixNotFound, Conflict for what is pinned or has an alias, PreconditionFailed.
        """
        return self._catalog.delete(ref, if_match, by)

    def ever_published(self, tenant: str, name: str) -> bool:
        """Whether the name was ever used, deleted or not."""
        return self._catalog.ever_published(tenant, name)


def check_lifetime(lifetime: float | None) -> float | None:
    """Returns a lifetime in seconds if it is legal, else raises InvalidRequest."""
    if lifetime is not None and not (math.isfinite(lifetime) and 0 < lifetime <= LONGEST_LIFETIME):
        raise InvalidRequest(
            f"a lifetime is more than 0 and at most {LONGEST_LIFETIME:.0f} seconds, got {lifetime}", param="ttl_seconds"
        )
    return lifetime
