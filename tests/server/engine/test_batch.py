"""The batch of each row's next token is taken from the last one, and is the one that would be built."""

from __future__ import annotations

import pytest
import torch

from server.engine.batch import Batch, Unread, behind, build
from server.scheduler.limits import Limits
from server.scheduler.messages import GenerationRequest, PrefixPayload
from server.scheduler.plan import RowResult, StepPlan
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.scheduler import Scheduler

PREFIXES = [
    None,
    PrefixPayload("five", 5, 5, True, None),
    PrefixPayload("nine", 9, 0, True, None),
    PrefixPayload("memory", 0, 0, True, None, feature_map="elu", memory_slots=4),
]


class Chain:
    """Twelve rows over four prefixes, and the steps behind one another in which they decode."""

    def __init__(self, windows: tuple[int, ...] = (0,), new: int = 40) -> None:
        self.windows = windows
        self.scheduler = Scheduler(Limits(4000, 16, 64, 100, 50, memory_slots=4), frozenset({1}), lambda: 0.0)
        for number in range(12):
            params = SamplingParams(max_tokens=new)
            prompt = tuple(range(2, 4 + number % 3))
            self.scheduler.add(GenerationRequest(f"{number}", "t", prompt, params, PREFIXES[number % 4]), number)
        self.plan = self.scheduler.schedule()
        while not all(row.sequence.is_decoding for row in self.plan.rows):
            self.scheduler.commit(self.plan, self.said(self.plan))
            self.plan = self.scheduler.schedule()
        self.batch = build(self.plan, windows)

    def said(self, plan: StepPlan, ending: str = "") -> list[RowResult]:
        said = [1 if row.sequence.request.id == ending else 7 for row in plan.rows]
        return [RowResult(token if row.samples else None) for token, row in zip(said, plan.rows, strict=True)]

    def on(self, ending: str = "") -> tuple[Batch | None, Batch]:
        """The next step's batch, taken from the last and built."""
        unread = Unread(torch.arange(len(self.plan.rows)), self.batch.selections)
        plan = self.scheduler.ahead(self.plan)
        assert plan is not None
        taken, built = behind(self.batch, plan.rows, unread), build(plan, self.windows, unread=unread)
        self.scheduler.commit(self.plan, self.said(self.plan, ending))
        self.plan, self.batch = StepPlan((), tuple(row for row in plan.rows if row.is_alive)), built
        return taken, built


def test_it_is_the_batch_that_would_be_built():
    chain = Chain()
    for _ in range(30):
        taken, built = chain.on()
        assert taken is not None
        for name in ("token_ids", "positions", "slots", "memories", "selected", "unread"):
            assert torch.equal(getattr(taken, name), getattr(built, name)), name
        assert torch.equal(taken.work[0], built.work[0])
        assert taken.selections == built.selections
        chain.batch = taken


def test_a_row_that_has_ended_makes_it_another_one():
    chain = Chain()
    assert chain.on(ending="3")[0] is not None
    assert chain.on()[0] is None
    assert chain.on()[0] is not None


def test_a_row_that_moves_makes_it_another_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("server.scheduler.admission.HEADROOM", 1)
    chain = Chain()
    found = [chain.on()[0] is not None for _ in range(20)]
    assert any(found)
    assert not all(found)


def test_a_window_makes_it_another_one():
    assert Chain((0, 8)).on()[0] is None


def test_what_reads_prompts_has_none():
    chain = Chain()
    first = Scheduler(Limits(400, 4, 64, 100, 50), frozenset(), lambda: 0.0)
    first.add(GenerationRequest("a", "t", (2, 3, 4), SamplingParams(max_tokens=9)), 0)
    plan = first.schedule()
    batch = build(plan, (0,))
    assert behind(batch, first.ahead(plan).rows, Unread(torch.zeros(1), batch.selections)) is None
    assert behind(chain.batch, plan.rows, Unread(torch.zeros(1), batch.selections)) is None
