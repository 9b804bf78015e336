"""Who is next, who gets how much of a step, and who makes way: the rules between tenants, as functions of the state.

Service decides who is next; rows decide whether next means now. A tenant that runs nothing is let in at once, at the
cost of whoever has the most rows. A row is only taken from a tenant that keeps another one; a single request may take
the only row of a tenant that has more waiting. So what was let in is never taken back for the same reason, and letting
in comes to an end by itself. A group of beams is several rows that come and go together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable

from server.scheduler.sequence import Sequence
from server.scheduler.service import Service
from server.scheduler.waiting import Line


def turns(
    lines: list[Line], running: list[Sequence], service: Service, allowance: int
) -> tuple[list[Line], list[Line]]:
    """The waiting lines in the order they are served: those entitled to a row at once, then all others.

    Tenants without a row come first. Then least service counts, the prompts of running rows taken as computed; then
    fewest rows; then who began to wait first. Entitled is who has no row and either the least service or only one
    request. Tenants more than `allowance` ahead of the least are left out: it is not their turn, even if what the
    others ask for does not fit. All in all that is a small tenant's right to its next request without first paying
    back the last one, and no larger share for one that always wants more.
    """
    rows = rows_by_tenant(running)
    standing = {line.tenant: service.received(line.tenant) for line in lines}
    for sequence in running:
        if sequence.request.tenant in standing:
            standing[sequence.request.tenant] += service.owed(sequence)
    least = min(standing.values(), default=0)
    entitled, others = [], []
    for line in sorted(lines, key=lambda line: (min(rows[line.tenant], 1), standing[line.tenant], rows[line.tenant])):
        ahead = standing[line.tenant] - least
        if not rows[line.tenant] and (ahead == 0 or len(line) == 1) and ahead <= allowance:
            entitled.append(line)
        elif ahead <= allowance:
            others.append(line)
    return entitled, others


def set_aside(budget: int, prompts: Collection[Sequence], lines: Iterable[Line]) -> int:
    """Tokens of a step that prompts which have begun leave to those that wait.

    The equal share of each waiting tenant that has none begun; and half where only one has, which holds up nobody,
    however long it is.
    """
    begun = {sequence.request.tenant for sequence in prompts}
    if not begun:
        return 0
    apart = sum(line.tenant not in begun for line in lines)
    half = budget // 2 if len(prompts) == 1 else 0
    return max(half, budget * apart // (apart + len(begun)))


def share_out(budget: int, sequences: Iterable[Sequence]) -> list[tuple[Sequence, int]]:
    """Tokens of a step for rows with prompts to compute: for every tenant the same, as far as it has use for them.

    Max-min fair: whoever wants least is served first, and what it leaves is shared by the rest. Within a tenant half
    goes to whoever came first and the other to whoever is done soonest, so that neither waits for all of the other.
    """
    by_tenant: defaultdict[str, list[Sequence]] = defaultdict(list)
    for sequence in sequences:
        by_tenant[sequence.request.tenant].append(sequence)
    chunks = []
    groups = sorted(by_tenant.values(), key=lambda group: sum(sequence.remaining for sequence in group))
    for index, group in enumerate(groups):
        share = -(-budget // (len(groups) - index))
        for sequence, count in _within(group, share):
            chunks.append((sequence, count))
            budget -= count
    return chunks


def _within(group: list[Sequence], share: int) -> list[tuple[Sequence, int]]:
    """One tenant's tokens, in order of arrival."""
    first = group[0]
    counts = {first: min(-(-share // 2), first.remaining)}
    share -= counts[first]
    for sequence in sorted(group, key=lambda sequence: sequence.remaining):
        more = min(share, sequence.remaining - counts.get(sequence, 0))
        counts[sequence] = counts.get(sequence, 0) + more
        share -= more
    return [(sequence, counts[sequence]) for sequence in group if counts[sequence]]


def newest_of_most(candidates: list[Sequence], rows: Counter[str]) -> Sequence:
    """The newest row of the tenant that has the most; among equals, the newest. Candidates are oldest first."""
    index = max(range(len(candidates)), key=lambda index: (rows[candidates[index].request.tenant], index))
    return candidates[index]


def make_way(
    running: list[Sequence], flooding: Container[str], is_enough: Callable[[list[Sequence]], bool]
) -> list[Sequence] | None:
    """The rows to take so that `is_enough` holds, newest first; None if there are not enough.

    Each comes from whoever has the most and keeps one, and only then from a `flooding` tenant that has just one. No
    more than needed: of many small ones only those that lie together.
    """
    spare = _spare(running, flooding)
    if not is_enough(spare):
        return None
    count = next(count for count in range(len(spare) + 1) if is_enough(spare[:count]))
    leaving = spare[:count]
    for sequence in reversed(spare[:count]):
        rest = [other for other in leaving if other is not sequence]
        if is_enough(rest):
            leaving = rest
    return leaving


def rows_by_tenant(running: Iterable[Sequence]) -> Counter[str]:
    """How many rows each tenant has."""
    rows: Counter[str] = Counter()
    for sequence in running:
        rows[sequence.request.tenant] += sequence.width
    return rows


def _spare(running: list[Sequence], flooding: Container[str]) -> list[Sequence]:
    rows, staying, spare = rows_by_tenant(running), list(running), []
    own = Counter(sequence.request.tenant for sequence in running)
    while candidates := [sequence for sequence in staying if own[sequence.request.tenant] > 1]:
        sequence = newest_of_most(candidates, rows)
        staying.remove(sequence)
        spare.append(sequence)
        own[sequence.request.tenant] -= 1
        rows[sequence.request.tenant] -= sequence.width
    return spare + [sequence for sequence in reversed(staying) if sequence.request.tenant in flooding]
