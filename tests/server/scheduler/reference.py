"""The scheduler's rules between tenants once more, as plainly as they can be said, for a pool that never runs short.

Nothing is kept but requests, in the order they came, and what was ever computed; everything else is found by looking
at all of it again. Slow, and shares no code with the scheduler.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Asked:
    """A request: `prompt` tokens, then `sampled` so far; `done` of them have been through the model."""

    name: str
    tenant: str
    prompt: int
    new: int
    sampled: int = 0
    done: int = 0
    seen: set[int] = field(default_factory=set)

    @property
    def left(self) -> int:
        return self.prompt + self.sampled - self.done


class Reference:
    """`plan` says which (request, start, count) run next; `commit` takes that as done."""

    def __init__(self, rows: int, step_tokens: int, allowance: int) -> None:
        self.rows, self.step_tokens, self.allowance = min(rows, step_tokens), step_tokens, allowance
        self.running: list[Asked] = []
        self.lines: dict[str, list[Asked]] = {}  # who waits, tenants in the order they began to
        self.counters: Counter[str] = Counter()
        self.last_to_wait: str | None = None

    def add(self, asked: Asked) -> None:
        self._begin_to_wait(asked.tenant)
        self.lines[asked.tenant].append(asked)

    def end(self, name: str) -> None:
        for asked in [*self.running, *(asked for line in self.lines.values() for asked in line)]:
            if asked.name == name:
                self._leave(asked)

    def plan(self) -> list[tuple[str, int, int]]:
        while self._let_one_in():
            pass
        rows = [(asked, 1) for asked in self.running if asked.left == 1]
        budget = self.step_tokens - len(rows)
        prompts = [asked for asked in self.running if asked.left > 1]
        begun = {asked.tenant for asked in prompts}
        apart = len(self.lines.keys() - begun)
        equal = budget * apart // (apart + len(begun)) if begun else 0
        beside = self._admitted(max(equal, budget // 2 if len(prompts) == 1 else 0))
        budget -= sum(count for _, count in beside)
        chunks = self._prompts(budget, prompts)
        rows += chunks + beside + self._admitted(budget - sum(count for _, count in chunks))
        return [(asked.name, asked.done, count) for asked, count in rows]

    def _admitted(self, budget: int) -> list[tuple[Asked, int]]:
        rows = []
        while budget > 0 and len(self.running) < self.rows and (tenant := self._next()):
            asked = self._admit(tenant)
            rows.append((asked, min(budget, asked.left)))
            budget -= rows[-1][1]
        return rows

    def commit(self, plan: list[tuple[str, int, int]], ended: set[str]) -> None:
        """`ended`: who sampled a token that ends it."""
        for name, start, count in plan:
            asked = next(asked for asked in self.running if asked.name == name)
            fresh = set(range(start, min(start + count, asked.prompt))) - asked.seen
            asked.seen |= fresh
            self.counters[asked.tenant] += len(fresh)
            asked.done += count
            if asked.left == 0:
                asked.sampled += 1
                self.counters[asked.tenant] += 2
                if asked.sampled == asked.new or name in ended:
                    self._leave(asked)

    def _has(self, tenant: str) -> int:
        return sum(asked.tenant == tenant for asked in self.running)

    def _standing(self, tenant: str) -> int:
        unpaid = sum(asked.prompt - len(asked.seen) for asked in self.running if asked.tenant == tenant)
        return self.counters[tenant] + unpaid

    def _ahead(self, tenant: str) -> int:
        return self._standing(tenant) - min(self._standing(other) for other in self.lines)

    def _next(self) -> str | None:
        """The tenant to admit from: without a row, then least service, then fewest rows, then longest waiting."""
        for wants_row in (True, False):
            best = None
            for tenant in self.lines:
                if (self._has(tenant) == 0) is not wants_row or self._ahead(tenant) > self.allowance:
                    continue
                key = (self._standing(tenant), self._has(tenant))
                if best is None or key < (self._standing(best), self._has(best)):
                    best = tenant
            if best is not None:
                return best
        return None

    def _let_one_in(self) -> bool:
        ranked = sorted(self.lines, key=self._standing)
        for tenant in ranked:
            single = len(self.lines[tenant]) == 1
            ahead = self._ahead(tenant)
            if self._has(tenant) or ahead > self.allowance or not (single or ahead == 0):
                continue
            if len(self.running) == self.rows:
                victim = self._who_makes_way(single)
                if victim is None:
                    continue
                self._preempt(victim)
            self._admit(tenant)
            return True
        return False

    def _who_makes_way(self, for_single: bool) -> Asked | None:
        most = max(self._has(asked.tenant) for asked in self.running)
        if most > 1:
            return [asked for asked in self.running if self._has(asked.tenant) == most][-1]
        floods = [asked for asked in self.running if self.lines.get(asked.tenant)]
        return floods[-1] if for_single and floods else None

    def _preempt(self, asked: Asked) -> None:
        self.running.remove(asked)
        asked.done = 0
        self._begin_to_wait(asked.tenant)
        self.lines[asked.tenant].insert(0, asked)

    def _admit(self, tenant: str) -> Asked:
        asked = self.lines[tenant][0]
        self._leave(asked)
        self.running.append(asked)
        return asked

    def _begin_to_wait(self, tenant: str) -> None:
        if tenant in self.lines:
            return
        others = list(self.lines) or ([self.last_to_wait] if self.last_to_wait else [])
        if others:
            self.counters[tenant] = max(self.counters[tenant], min(self.counters[other] for other in others))
        self.lines[tenant] = []

    def _leave(self, asked: Asked) -> None:
        if asked in self.running:
            self.running.remove(asked)
            return
        self.lines[asked.tenant].remove(asked)
        if not self.lines[asked.tenant]:
            del self.lines[asked.tenant]
            self.last_to_wait = asked.tenant

    def _prompts(self, budget: int, prompts: list[Asked]) -> list[tuple[Asked, int]]:
        """Deals tokens out one at a time, round and round the tenants, who wants least first."""
        wanting: dict[str, list[Asked]] = {}
        for asked in prompts:
            wanting.setdefault(asked.tenant, []).append(asked)
        wants = {tenant: sum(asked.left for asked in line) for tenant, line in wanting.items()}
        order = sorted(wants, key=lambda tenant: wants[tenant])
        dealt: Counter[str] = Counter()
        while budget and any(dealt[tenant] < wants[tenant] for tenant in order):
            for tenant in order:
                if budget and dealt[tenant] < wants[tenant]:
                    dealt[tenant] += 1
                    budget -= 1
        rows = []
        for tenant in order:
            rows += self._within(wanting[tenant], dealt[tenant])
        return rows

    def _within(self, line: list[Asked], dealt: int) -> list[tuple[Asked, int]]:
        """Half of a tenant's tokens to its first prompt, then one after another to whoever needs fewest."""
        given: Counter[str] = Counter()
        for turn in range(dealt):
            open_ones = [asked for asked in line if given[asked.name] < asked.left]
            if turn < -(-dealt // 2) and line[0] in open_ones:
                given[line[0].name] += 1
            else:
                given[min(open_ones, key=lambda asked: asked.left).name] += 1
        return [(asked, given[asked.name]) for asked in line if given[asked.name]]
