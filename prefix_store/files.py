"""Files of training data that a tenant has uploaded, kept as the bytes that came."""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefix_store import audit, collection, examples, holds, layout, usage
from prefix_store.audit import LOCAL
from prefix_store.backends.base import Backend, Blobs, Transaction
from prefix_store.errors import InvalidRequest, NoSuchFile, QuotaExceeded, StoreCorrupt
from prefix_store.prefix import check_name

PURPOSE = "fine-tune"
# Milliseconds, then chance: ids of one tenant sort as the files came.
ID = re.compile(r"file-[0-9a-f]{11}[0-9a-f]{16}")
LONGEST_NAME = 255


@dataclass(frozen=True)
class StoredFile:
    """One file. `filename` is what its owner calls it, and names nothing here."""

    id: str
    tenant: str
    digest: str
    size_bytes: int
    created_at: float
    filename: str
    purpose: str = PURPOSE

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as the store keeps it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StoredFile:
        """Reads `to_json`'s object; fields that it does not know are a later version's."""
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls) if field.name in data})


class FileStore:
    """Uploaded files. They count as bytes of their tenant's. `by` says who makes a change, for the audit log."""

    def __init__(self, backend: Backend, blobs: Blobs) -> None:
        self._backend = backend
        self._blobs = blobs

    def save(
        self,
        tenant: str,
        filename: str,
        path: Path,
        digest: str,
        by: str = LOCAL,
        also: Callable[[Transaction, StoredFile], None] | None = None,
    ) -> StoredFile:
        """Keeps a file of the blobs' spool, which is used up, under the digest it has.

        `also` is done in the transaction that keeps it. Raises InvalidName, InvalidTrainingData with the lines,
        QuotaExceeded, PayloadTooLarge, StoreUnavailable, and what `also` raises.
        """
        check_name(tenant, "tenant")
        examples.read(path.read_bytes(), "file")
        file = StoredFile(secrets.token_hex(8), tenant, digest, path.stat().st_size, 0.0, filename[:LONGEST_NAME])
        with holds.held(self._backend, tenant, digest) as hold:
            self._blobs.put_file(path, digest)
            work = partial(_add, file, hold, by, also)
            try:
                return self._backend.write(work)
            except QuotaExceeded:
                collection.expire(self._backend)
                return self._backend.write(work)

    def find(self, tenant: str, file_id: str) -> StoredFile:
        """The file. Raises NoSuchFile."""
        with self._backend.view() as view:
            data = view.get(layout.file(tenant, file_id)) if ID.fullmatch(file_id) else None
        if data is None:
            raise NoSuchFile(f"there is no file {file_id[:80]!r}")
        return StoredFile.from_json(data)

    def page(self, tenant: str, after: str | None, limit: int, *, newest_first: bool = True) -> list[StoredFile]:
        """The tenant's files in the order they came, or against it; `after` is the last id of the page before.

        That file may have been deleted since: its id still says when it came. Raises InvalidRequest for what is no id.
        """
        if after is not None and not ID.fullmatch(after):
            raise InvalidRequest(f"after must be the id of a file, got {after[:80]!r}", param="after")
        with self._backend.view() as view:
            page = view.scan(layout.file(tenant), after=after or "", limit=limit, descending=newest_first)
        return [StoredFile.from_json(data) for _, data in page]

    def read(self, file: StoredFile) -> bytes:
        """The file's bytes. Raises StoreCorrupt unless they match the digest, NoSuchFile if it is deleted."""
        try:
            return self._blobs.read(file.digest)
        except StoreCorrupt:
            self.find(file.tenant, file.id)  # what was deleted since has no bytes, and nothing is corrupt
            raise

    def delete(self, tenant: str, file_id: str, by: str = LOCAL) -> StoredFile:
        """Removes a file and, unless something else needs them, its bytes. Jobs keep their own. Raises NoSuchFile."""
        found = self.find(tenant, file_id)

        def work(transaction: Transaction) -> None:
            if transaction.get(layout.file(tenant, file_id)) is None:
                raise NoSuchFile(f"there is no file {file_id[:80]!r}")
            transaction.delete(layout.file(tenant, file_id))
            transaction.delete(layout.blob_of_file(found.digest, file_id))
            usage.add(transaction, tenant, size_bytes=-found.size_bytes)
            audit.record(transaction, by, tenant, "file.delete", file_id, found.digest)

        self._backend.write(work)
        self._blobs.remove_unless(found.digest, partial(holds.is_needed, self._backend, found.digest))
        return found


def _add(
    file: StoredFile,
    hold: str,
    by: str,
    also: Callable[[Transaction, StoredFile], None] | None,
    transaction: Transaction,
) -> StoredFile:
    """Writes a file whose id is its random part yet: the rest is the store's time."""
    holds.release(transaction, hold)
    now = transaction.now
    made = dataclasses.replace(file, id=f"file-{int(now * 1000):011x}{file.id}", created_at=now)
    usage.add(transaction, made.tenant, size_bytes=made.size_bytes)
    transaction.put(layout.file(made.tenant, made.id), made.to_json())
    transaction.put(layout.blob_of_file(made.digest, made.id), {})
    audit.record(transaction, by, made.tenant, "file.upload", made.id, made.digest)
    if also is not None:
        also(transaction, made)
    return made
