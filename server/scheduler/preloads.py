"""Prefixes that stay on the device though nobody may be reading them, because somebody asked for it."""

from __future__ import annotations

from collections.abc import Hashable

from prefix_store.errors import Conflict, InvalidRequest
from server.scheduler.messages import PrefixPayload


class Preloads:
    """Digest -> payload and who holds it; never more than `most` slots in all.

    Missing are those that are to be brought in before the next rows are planned.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._payloads: dict[str, PrefixPayload] = {}
        self._holders: dict[str, set[Hashable]] = {}
        self._missing: set[str] = set()

    def __contains__(self, digest: object) -> bool:
        return digest in self._payloads

    def __len__(self) -> int:
        return len(self._payloads)

    @property
    def slots(self) -> int:
        """KV slots that they take all together."""
        return sum(payload.slots for payload in self._payloads.values())

    @property
    def missing(self) -> list[PrefixPayload]:
        """In the order that they were asked for in."""
        return [payload for digest, payload in self._payloads.items() if digest in self._missing]

    def holders(self) -> dict[str, frozenset[Hashable]]:
        """Who holds each digest."""
        return {digest: frozenset(holders) for digest, holders in self._holders.items()}

    def add(self, payload: PrefixPayload, holder: Hashable) -> None:
        """Notes a holder; content that several hold counts once.

        Raises InvalidRequest for what is too large for ever, Conflict while others take its room.
        """
        if payload.digest not in self._payloads:
            if payload.slots > self.most:
                raise InvalidRequest(
                    f"the prefix takes {payload.slots} KV slots; preloaded ones may take {self.most} in all",
                    param="prefix_id",
                )
            if self.slots + payload.slots > self.most:
                raise Conflict(
                    f"the prefix takes {payload.slots} KV slots; of the {self.most} for preloaded ones {self.slots} "
                    "are taken: release another one first",
                    param="prefix_id",
                )
            self._payloads[payload.digest] = payload
            self._holders[payload.digest] = set()
        self._holders[payload.digest].add(holder)
        self._missing.add(payload.digest)

    def remove(self, digest: str, holder: Hashable) -> None:
        """One holder less; harmless for who is none. What nobody holds stays no longer."""
        holders = self._holders.get(digest, set())
        holders.discard(holder)
        if not holders:
            for kept in (self._payloads, self._holders):
                kept.pop(digest, None)
            self._missing.discard(digest)

    def miss_all(self) -> None:
        """All of them are to be brought in again."""
        self._missing = set(self._payloads)

    def miss_none(self) -> None:
        """None is to be brought in: all are there, or else come with the first request that reads them."""
        self._missing.clear()
