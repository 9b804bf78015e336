"""Requests of several tenants through a scheduler without an engine: every sampled token is 7."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import count

from server.scheduler.beams import begin
from server.scheduler.limits import Limits
from server.scheduler.messages import FinishReason, GenerationRequest, PrefixPayload
from server.scheduler.plan import RowResult, StepPlan
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.scheduler import Scheduler
from server.scheduler.sequence import Sequence
from server.scheduler.service import GENERATED_WEIGHT, PROMPT_WEIGHT

EOS = 1


def make_scheduler(**limits: int) -> Scheduler:
    numbers = {"slots": 100_000, "rows": 8, "step_tokens": 32, "context_length": 100, "waiting": 5000} | limits
    return Scheduler(Limits(**numbers), frozenset({EOS}), lambda: 0.0)


def make_request(
    tenant: str,
    name: str,
    prompt: int = 4,
    new: int = 3,
    prefix: PrefixPayload | None = None,
    source: int = 0,
    beams: int = 1,
) -> GenerationRequest:
    params, source_ids = SamplingParams(max_tokens=new, num_beams=beams), tuple(range(source))
    return GenerationRequest(name, tenant, tuple(range(prompt)), params, prefix, source_ids=source_ids)


def make_sequence(tenant: str = "a", prompt: int = 4, new: int = 3, name: str = "r", beams: int = 1) -> Sequence:
    return begin(make_request(tenant, name, prompt, new, beams=beams), 0, frozenset())


class Traffic:
    """Feeds a scheduler and keeps its own books, by what was planned and nothing else.

    `blind` is the control: the scheduler takes all requests for one tenant's, which makes it first come first served.
    """

    def __init__(self, scheduler: Scheduler, *, blind: bool = False) -> None:
        self.scheduler = scheduler
        self.steps = 0
        self.served: Counter[str] = Counter()  # weighted tokens by tenant, each token once
        self.in_flight: Counter[str] = Counter()
        self.first_planned: dict[str, int] = {}
        self.finished: dict[str, int] = {}
        self.recomputed = 0
        self._blind = blind
        self._names = count()
        self._seen: set[tuple[str, int]] = set()

    def add(self, tenant: str, prompt: int, new: int, prefix: PrefixPayload | None = None) -> str:
        name = f"{tenant}/{next(self._names)}"
        self.scheduler.add(make_request("all" if self._blind else tenant, name, prompt, new, prefix), seed=0)
        self.in_flight[tenant] += 1
        return name

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.steps += 1
        for row in plan.rows:
            request_id = row.sequence.request.id
            self.first_planned.setdefault(request_id, self.steps)
            for index in range(row.start, row.start + row.count):
                self._compute(request_id, index, row.sequence.prompt_length)
            self.served[_tenant(request_id)] += GENERATED_WEIGHT * row.samples
        for event in self.scheduler.commit(plan, [RowResult(7 if row.samples else None) for row in plan.rows]):
            if event.finish_reason is FinishReason.LENGTH:
                self.finished[event.request_id] = self.steps
                self.in_flight[_tenant(event.request_id)] -= 1
        return plan

    def run(self, steps: int, shapes: dict[str, tuple[int, int]] | None = None, depth: int = 20) -> Counter[str]:
        """Steps with every tenant of `shapes` kept at `depth` requests of its (prompt, new); what they were served."""
        before = self.served.copy()
        for _ in range(steps):
            for tenant, (prompt, new) in (shapes or {}).items():
                while self.in_flight[tenant] < depth:
                    self.add(tenant, prompt, new)
            self.step()
        return self.served - before

    def wait_for(self, name: str, most: int = 10_000) -> int:
        """Steps until a request is first planned, this one included."""
        before = self.steps
        while name not in self.first_planned:
            assert self.steps - before < most, "it is never planned"
            self.step()
        return self.first_planned[name] - before

    def _compute(self, request_id: str, index: int, prompt_length: int) -> None:
        if (request_id, index) in self._seen:
            self.recomputed += 1
        elif index < prompt_length:
            self.served[_tenant(request_id)] += PROMPT_WEIGHT
        self._seen.add((request_id, index))


def shares(served: Counter[str], tenants: Iterable[str]) -> list[float]:
    """Each tenant's part of the whole."""
    return [served[tenant] / served.total() for tenant in tenants]


def _tenant(request_id: str) -> str:
    return request_id.partition("/")[0]
