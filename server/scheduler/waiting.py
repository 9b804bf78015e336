"""Sequences that wait for room: a line for each tenant, first come first served within it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from prefix_store.errors import Overloaded
from server.scheduler.sequence import Sequence
from server.scheduler.service import Service


class Line:
    """One tenant's waiting sequences, first come first served."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self._queue: OrderedDict[Sequence, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    @property
    def first(self) -> Sequence:
        """Who is next in this line."""
        return next(iter(self._queue))

    def push(self, sequence: Sequence) -> None:
        """Adds at the end."""
        self._queue[sequence] = None

    def push_front(self, sequence: Sequence) -> None:
        """Adds before all others."""
        self._queue[sequence] = None
        self._queue.move_to_end(sequence, last=False)

    def remove(self, sequence: Sequence) -> None:
        """Takes one out, wherever it stands."""
        del self._queue[sequence]


class WaitingQueue:
    """A bounded queue; what was preempted goes back to the front of its tenant's line and is never refused.

    Once `limit` sequences wait, only a tenant with fewer than its equal share of that many places gets in. So one
    tenant's flood is no other's refusal, and the queue of n tenants is never longer than limit × (1 + 1/2 + … + 1/n).

    A tenant that begins to wait is lifted to the least counter among those that wait already, or, if nobody does, to
    that of the last tenant that did: credit is not saved up while idle.
    """

    def __init__(self, limit: int, service: Service) -> None:
        self._limit = limit
        self._service = service
        self._lines: dict[str, Line] = {}
        self._last_tenant: str | None = None
        self.changes = 0  # of who waits
        self.tokens = 0  # to be computed for all of them

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for line in self._lines.values() for sequence in line)

    @property
    def lines(self) -> list[Line]:
        """Those with somebody in them, by when their tenant began to wait."""
        return list(self._lines.values())

    def push(self, sequence: Sequence) -> None:
        """Adds at the end of its tenant's line. Raises Overloaded when full."""
        tenant = sequence.request.tenant
        waiting, own = len(self), len(self._lines.get(tenant, ()))
        tenants = len(self._lines.keys() | {tenant})
        if waiting >= self._limit and own >= max(1, self._limit // tenants):
            yours = f", {own} of them yours" if own < waiting else ""
            raise Overloaded(f"{waiting} requests are waiting already{yours}; try again later")
        self._line(tenant).push(sequence)
        self._note(sequence.remaining)

    def push_front(self, sequence: Sequence) -> None:
        """Adds a preempted sequence before all others of its tenant."""
        self._line(sequence.request.tenant).push_front(sequence)
        self._note(sequence.remaining)

    def remove(self, sequence: Sequence) -> None:
        """Takes that one out."""
        tenant = sequence.request.tenant
        line = self._lines[tenant]
        line.remove(sequence)
        self._note(-sequence.remaining)
        if not line:
            del self._lines[tenant]
            self._last_tenant = tenant

    def check_integrity(self) -> None:
        """Raises AssertionError unless every line is its tenant's own and has somebody in it, and the tokens add up."""
        assert self.tokens == sum(sequence.remaining for sequence in self), "tokens that wait are counted wrong"
        for tenant, line in self._lines.items():
            assert len(line) > 0, f"an empty line of {tenant}"
            assert all(sequence.request.tenant == tenant for sequence in line), f"a stranger in the line of {tenant}"

    def _note(self, tokens: int) -> None:
        self.changes += 1
        self.tokens += tokens

    def _line(self, tenant: str) -> Line:
        line = self._lines.get(tenant)
        if line is None:
            self._service.lift(tenant, self._level())
            line = self._lines[tenant] = Line(tenant)
        return line

    def _level(self) -> int:
        if self._lines:
            return min(self._service.received(tenant) for tenant in self._lines)
        return self._service.received(self._last_tenant) if self._last_tenant is not None else 0
