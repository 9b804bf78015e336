"""Blobs in Redis or Valkey, where machines share no folder. Implements `backends.base.Blobs`."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast

import redis

from prefix_store.backends.blobs import check_digest
from prefix_store.backends.redis_client import BLOB, BLOBS, CHUNK, INDEX, answering, connect
from prefix_store.backends.spool import Spool
from prefix_store.errors import PayloadTooLarge, StoreCorrupt

MB = 1 << 20
# Redis serves one command at a time: a larger value would keep every other client waiting for it.
CHUNK_BYTES = 4 * MB
LARGEST = 256 * MB
REMOVE_ATTEMPTS = 10


class RedisBlobs:
    """Every blob in chunks; its size is written after them and removed before them.

    Files on their way lie in the machine's temporary folder, for there may be no other.
    """

    def __init__(self, url: str) -> None:
        self._client = connect(url)
        self._spool = Spool(Path(tempfile.gettempdir(), f"antefix-{os.geteuid()}"))

    def claim(self, store_id: str, records: Path | None) -> None:
        """See `Blobs`. They lie beside the store's records."""

    def put(self, data: bytes) -> str:
        """See `Blobs`."""
        digest = hashlib.sha256(data).hexdigest()
        self._put(BytesIO(data), len(data), digest)
        return digest

    def spool(self) -> AbstractContextManager[Path]:
        """See `Blobs`."""
        return self._spool.file()

    def put_file(self, path: Path, digest: str) -> None:
        """See `Blobs`."""
        with path.open("rb") as file:
            self._put(file, path.stat().st_size, digest)

    def read(self, digest: str) -> bytes:
        """See `Blobs`."""
        return b"".join(self._chunks(digest))

    @contextmanager
    def file(self, digest: str) -> Iterator[Path]:
        """See `Blobs`. A copy that is gone afterwards."""
        with self._spool.file() as path:
            with path.open("wb") as copy:
                for chunk in self._chunks(digest):
                    copy.write(chunk)
            yield path

    def digests(self) -> Iterator[str]:
        """See `Blobs`."""
        with answering():
            for digest in self._client.sscan_iter(BLOBS, count=1000):
                yield cast("bytes", digest).decode()

    def remove_unless(self, digest: str, needed: Callable[[], bool]) -> bool:
        """See `Blobs`. A blob is left for the next time when records keep changing meanwhile."""
        with answering(), self._client.pipeline() as pipeline:
            for _ in range(REMOVE_ATTEMPTS):
                pipeline.watch(INDEX)
                if needed():
                    return False
                chunks = range(LARGEST // CHUNK_BYTES)
                pipeline.multi()
                pipeline.unlink(BLOB.format(digest=digest))
                pipeline.unlink(*(CHUNK.format(digest=digest, number=number) for number in chunks))
                pipeline.srem(BLOBS, digest)
                try:
                    pipeline.execute()
                except redis.WatchError:
                    continue
                return True
        return False

    def tidy(self) -> None:
        """See `Blobs`. What was left behind in Redis is among `digests`."""
        self._spool.tidy()

    def ping(self) -> None:
        """See `Blobs`."""
        with answering():
            self._client.ping()

    def free_bytes(self) -> int | None:
        """See `Blobs`."""
        return None

    def close(self) -> None:
        """See `Blobs`."""
        self._client.close()

    def _put(self, file: BinaryIO, size: int, digest: str) -> None:
        if size > LARGEST:
            raise PayloadTooLarge(
                f"with its blobs in Redis a store takes files of up to {LARGEST // MB} MB, got {size / MB:.0f} MB;"
                " set ANTEFIX_BLOBS to a shared folder"
            )
        with answering():
            self._client.sadd(BLOBS, digest)
            for number, chunk in enumerate(iter(partial(file.read, CHUNK_BYTES), b"")):
                self._client.set(CHUNK.format(digest=digest, number=number), chunk)
            self._client.set(BLOB.format(digest=digest), size)

    def _chunks(self, digest: str) -> Iterator[bytes]:
        """The blob in pieces. Raises StoreCorrupt with the last one unless all together match the digest."""
        with answering():
            size = cast("bytes | None", self._client.get(BLOB.format(digest=digest)))
        if size is None:
            raise StoreCorrupt(f"blob {digest} is missing")
        actual = hashlib.sha256()
        for number in range(-(-int(size) // CHUNK_BYTES)):
            with answering():
                chunk = cast("bytes | None", self._client.get(CHUNK.format(digest=digest, number=number)))
            if chunk is None:
                raise StoreCorrupt(f"blob {digest} has lost its part {number}")
            actual.update(chunk)
            yield chunk
        check_digest(digest, actual.hexdigest())
