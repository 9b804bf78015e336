"""Any order of operations leaves the scheduler in order: slots, prefixes, lines, counters."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefix_store.errors import Conflict, InvalidRequest, Overloaded, PrefixNumerics
from prefix_store.geometry import Stack
from server.scheduler.limits import Limits
from server.scheduler.messages import FinishReason, GenerationRequest, PrefixPayload
from server.scheduler.plan import Candidate, Load, RowResult, StepPlan
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.scheduler import Scheduler
from tests.server.scheduler.traffic import EOS

TENANTS = "abcd"
PREFIXES = [
    None,
    *(PrefixPayload(f"d{length}", length, length, True, None) for length in (1, 6, 17, 30)),
    *(PrefixPayload(f"m{slots}", 0, 0, True, None, feature_map="elu", memory_slots=slots) for slots in (2, 25)),
]


STACKED = [
    None,
    PrefixPayload("self", 6, 6, True, None),
    PrefixPayload("all", 17, 0, True, None, stacks=tuple(Stack)),
    PrefixPayload("cross", 30, 30, True, None, stacks=(Stack.CROSS,)),
    PrefixPayload("encoder", 9, 0, True, None, stacks=(Stack.ENCODER,)),
    PrefixPayload("soft", 5, 0, True, None, is_embeds=True, stacks=()),
    PrefixPayload("memory", 0, 0, True, None, feature_map="elu", memory_slots=25),
]


class Operations(RuleBasedStateMachine):
    """A decoder-only model's."""

    prefixes, sources, beside = PREFIXES, [0], 0

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.made = 0
        self.unanswered: set[str] = set()
        self.behind: StepPlan | None = None

    @initialize(
        slots=st.integers(100, 260),
        rows=st.integers(1, 8),
        step_tokens=st.integers(1, 40),
        waiting=st.integers(1, 12),
        headroom=st.sampled_from([1, 4, 64]),
    )
    def start(self, slots: int, rows: int, step_tokens: int, waiting: int, headroom: int) -> None:
        self.patch = mock.patch("server.scheduler.admission.HEADROOM", headroom)
        self.patch.start()
        limits = Limits(slots + self.beside, rows, step_tokens, 100, waiting, memory_slots=25, source_slots=self.beside)
        self.scheduler = Scheduler(limits, frozenset({EOS}), lambda: self.now)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.unanswered:
                break
            self.step(set(), set(), 1000, False)
            self.scheduler.check_integrity()
        assert not self.unanswered, "somebody is never served"
        assert self.scheduler.slots.used == sum(r.extent.size for r in self.scheduler.residency.residents())
        self.patch.stop()

    @rule(
        tenant=st.sampled_from(TENANTS),
        prompt=st.integers(1, 40),
        new=st.integers(1, 25),
        prefix=st.integers(0, 6),
        source=st.integers(0, 99),
        lasts=st.none() | st.integers(1, 20),
        times=st.sampled_from([1, 1, 5]),
        beams=st.sampled_from([1, 1, 1, 2, 3, 6]),
    )
    def add(
        self,
        tenant: str,
        prompt: int,
        new: int,
        prefix: int,
        source: int,
        lasts: int | None,
        times: int,
        beams: int,
    ) -> None:
        length = self.sources[source % len(self.sources)]
        for _ in range(times):
            name = f"{self.made}"
            deadline = self.now + lasts if lasts is not None else None
            request = GenerationRequest(
                name,
                tenant,
                tuple(range(prompt)),
                SamplingParams(max_tokens=new, num_beams=beams),
                self.prefixes[prefix],
                deadline,
                source_ids=tuple(range(length)),
            )
            waiting = [sequence.request.tenant for sequence in self.scheduler.waiting]
            self.made += 1
            try:
                self.scheduler.add(request, seed=0)
                self.unanswered.add(name)
            except Overloaded:
                assert len(waiting) >= self.scheduler.limits.waiting
                assert tenant in waiting, "refused because of others"
            except InvalidRequest:
                limits = self.scheduler.limits
                shared = request.source_length + (request.prefix.slots if request.prefix is not None else 0)
                needed = beams * (prompt + new) + shared
                assert beams > min(limits.rows, limits.step_tokens) or needed > limits.slots - limits.preloadable

    @rule(
        unlucky=st.sets(st.integers(0, 7), max_size=2),
        missing=st.sets(st.integers(0, 3), max_size=1),
        most=st.sampled_from([1, 3, 1000, 1000]),
        is_ahead=st.booleans(),
    )
    def step(self, unlucky: set[int], missing: set[int], most: int, is_ahead: bool) -> None:
        """`missing` of its loads find no memory; of no row more than `most` tokens are computed.

        If it `is_ahead`, the step behind it is planned, if it can be, before what comes of it is known.
        """
        self.now += 1.0
        self.answer(self.scheduler.expire())
        plan = self.planned()
        self.check_tokens(plan.rows)
        assert len({row.sequence for row in plan.rows}) == len(plan.rows)
        assert all(row.sequence.owner in self.scheduler.running and row.count > 0 for row in plan.rows)
        assert all(row.start + row.count <= row.sequence.extent.size for row in plan.rows)
        loads = [transfer for transfer in plan.transfers if isinstance(transfer, Load)]
        lost = [load for index, load in enumerate(loads) if index in missing]
        rows = [row for row in plan.rows if not any(load.is_read_by(row.sequence) for load in lost)]
        for load in lost:
            self.answer(self.scheduler.lose(load))
            assert not any(load.is_read_by(sequence) for sequence in self.scheduler.running)
            assert load.extent not in [
                resident.extent
                for resident in self.scheduler.residency.residents()
                if resident.payload.digest == load.payload.digest
            ]
        self.scheduler.check_integrity()
        carried = StepPlan(plan.transfers, tuple(replace(row, count=min(most, row.count)) for row in rows))
        self.behind = self.scheduler.ahead(carried) if is_ahead else None
        if self.behind is not None:
            self.scheduler.check_integrity()
            assert self.behind.rows
            assert all(row.samples and row.end <= row.sequence.extent.size for row in self.behind.rows)
        results = [self.result(row, i, unlucky) for i, row in enumerate(carried.rows)]
        self.answer(self.scheduler.commit(carried, results))

    def planned(self) -> StepPlan:
        """What of a plan that was made ahead is still to be had, or else a new one."""
        rows = tuple(row for row in self.behind.rows if row.is_alive) if self.behind is not None else ()
        if rows:
            return StepPlan(self.behind.transfers, rows)
        plan = self.scheduler.schedule()
        assert bool(plan.rows) == bool(self.unanswered)
        assert not self.scheduler.space.preloads.missing
        return plan

    def check_tokens(self, rows) -> None:
        """Those that are read too, unless it is one source that takes more than there are."""
        most, reading = self.scheduler.limits.step_tokens, [row for row in rows if row.encodes]
        assert sum(row.count for row in rows) <= most
        assert sum(row.cost for row in rows) <= most or len(reading) == 1
        assert all(row.start == 0 and row.sequence.source.size == row.sequence.source_length for row in reading)

    @rule(index=st.integers(0, 200))
    def abort(self, index: int) -> None:
        event = self.scheduler.abort(f"{index}", FinishReason.ABORT)
        assert (event is not None) == (f"{index}" in self.unanswered)
        self.answer([event] if event is not None else [])

    @rule(prefix=st.integers(1, 6), holder=st.sampled_from(TENANTS))
    def preload(self, prefix: int, holder: str) -> None:
        space = self.scheduler.space
        try:
            space.preload(self.prefixes[prefix], holder)
        except (Conflict, InvalidRequest):
            assert space.preloads.slots + self.prefixes[prefix].slots > self.scheduler.limits.preloadable

    @rule(prefix=st.integers(1, 6), holder=st.sampled_from(TENANTS))
    def release(self, prefix: int, holder: str) -> None:
        self.scheduler.space.release(self.prefixes[prefix].digest, holder)

    @precondition(lambda self: self.made > 20)
    @rule()
    def break_down(self) -> None:
        self.answer(self.scheduler.fail_running("broken"))
        assert not self.scheduler.running

    @invariant()
    def in_order(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        limit = self.scheduler.limits.waiting
        most = limit + sum(max(1, limit // place) for place in range(2, len(TENANTS) + 1))
        assert len(self.scheduler.waiting) <= most + self.scheduler.admission.preemptions

    def result(self, row, index: int, unlucky: set[int]) -> RowResult:
        if index in unlucky:
            return RowResult(error=PrefixNumerics()) if index % 2 else self.sampled(row, EOS)
        return self.sampled(row, 7)

    def sampled(self, row, token: int) -> RowResult:
        if not row.samples:
            return RowResult()
        if row.sequence.width == 1:
            return RowResult(token)
        tokens = [token, *range(10, 10 + row.sequence.width)]
        # who is best changes from step to step, so that beams take one another's places
        best = (row.sequence.generated * 7 + row.sequence.tokens[-1]) % 5
        return RowResult(candidates=tuple(Candidate(t, -0.1 * (best + i)) for i, t in enumerate(tokens)))

    def answer(self, events) -> None:
        for event in events:
            assert event.request_id in self.unanswered
            if event.finish_reason is not None:
                self.unanswered.remove(event.request_id)


class SourceOperations(Operations):
    """An encoder-decoder model's."""

    prefixes, sources, beside = STACKED, [1, 4, 17, 60], 60 + 5 + 30


SETTINGS = settings(max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
TestOperations = Operations.TestCase
TestOperations.settings = SETTINGS
TestSourceOperations = SourceOperations.TestCase
TestSourceOperations.settings = SETTINGS
