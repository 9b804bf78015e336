"""The scheduler does, step by step, what a brute-force statement of its rules does."""

from __future__ import annotations

import random

import pytest

from server.scheduler import fairness
from server.scheduler.messages import FinishReason
from server.scheduler.plan import RowResult
from tests.server.scheduler.reference import Asked, Reference
from tests.server.scheduler.traffic import EOS, make_request, make_scheduler


def differing_steps(seed: int) -> int:
    """Runs both over the same random traffic until they differ; 0 if they never do."""
    draw = random.Random(seed)
    rows, step_tokens = draw.choice([1, 2, 3, 6, 12]), draw.choice([1, 4, 10, 40])
    scheduler = make_scheduler(rows=rows, step_tokens=step_tokens, context_length=60)
    reference = Reference(rows, step_tokens, allowance=2 * 60)
    tenants, busy = "abcde"[: draw.randint(1, 5)], draw.choice([0.2, 0.6, 1.5])
    names: list[str] = []
    for step in range(250):
        for tenant in tenants:
            for _ in range(draw.choice([1, 1, 6]) if draw.random() < busy / len(tenants) else 0):
                asked = Asked(f"{len(names)}", tenant, draw.randint(1, 40), draw.randint(1, 20))
                names.append(asked.name)
                scheduler.add(make_request(tenant, asked.name, asked.prompt, asked.new), seed=0)
                reference.add(asked)
        if names and draw.random() < 0.1:
            name = draw.choice(names)
            scheduler.abort(name, FinishReason.ABORT)
            reference.end(name)
        plan, expected = scheduler.schedule(), reference.plan()
        if [(row.sequence.request.id, row.start, row.count) for row in plan.rows] != expected:
            return step + 1
        ended = {row.sequence.request.id for row in plan.rows if row.samples and draw.random() < 0.02}
        tokens = [EOS if row.sequence.request.id in ended else 7 for row in plan.rows]
        results = [RowResult(token if row.samples else None) for row, token in zip(plan.rows, tokens, strict=True)]
        scheduler.commit(plan, results)
        reference.commit(expected, ended)
        scheduler.check_integrity()
        assert {tenant: scheduler.service.received(tenant) for tenant in tenants} == {
            tenant: reference.counters[tenant] for tenant in tenants
        }
    return 0


@pytest.mark.parametrize("seed", range(80))
def test_every_step_is_the_references(seed):
    assert differing_steps(seed) == 0


@pytest.mark.parametrize("broken", ["newest_of_most", "share_out", "turns"])
def test_a_rule_that_is_broken_is_noticed(broken, monkeypatch):
    """The control: each rule matters to the comparison."""
    real = getattr(fairness, broken)
    replacement = {
        "newest_of_most": lambda candidates, rows: candidates[-1],
        "share_out": lambda budget, sequences: real(budget, list(sequences)[:1]),
        "turns": lambda lines, running, service, allowance: ([], lines),
    }[broken]
    monkeypatch.setattr(fairness, broken, replacement)
    assert any(differing_steps(seed) for seed in range(20))
