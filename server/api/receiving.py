"""A large body on its way to the disk: hashed as it comes, never whole in memory."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

from anyio import to_thread

from prefix_store.errors import StoreUnavailable

# Written at a time, so that a thread is not asked for each network packet.
PIECE = 1 << 20


class Received:
    """What has come of a file. `digest` is the sha256 of it, once `finish` was called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digest = ""
        self._sha256 = hashlib.sha256()
        self._pending = bytearray()

    async def take(self, data: bytes) -> None:
        """The next bytes."""
        self._pending += data
        if len(self._pending) >= PIECE:
            await self._write()

    async def finish(self) -> None:
        """Writes what is left."""
        await self._write()
        self.digest = self._sha256.hexdigest()

    async def _write(self) -> None:
        data, self._pending = self._pending, bytearray()
        await to_thread.run_sync(self._append, data)

    def _append(self, data: bytearray) -> None:
        self._sha256.update(data)
        try:
            with self.path.open("ab") as file:
                file.write(data)
        except OSError as error:
            raise StoreUnavailable(f"the upload cannot be kept: {error.strerror}") from error


async def receive(body: AsyncIterator[bytes], path: Path) -> Received:
    """A whole body."""
    received = Received(path)
    async for chunk in body:
        await received.take(chunk)
    await received.finish()
    return received
