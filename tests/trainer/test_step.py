"""Runs that share a step must end as they would alone, whatever the others are and whatever befalls them."""

from __future__ import annotations

import weakref

import pytest
import torch

from tests.trainer.runs import EXAMPLES, FROZEN, make
from trainer import forward, objective, step, tuning
from trainer.tuning import Tuning
from trainer.validation import Validation

STEPS = 12
JOBS = [
    {"virtual_tokens": 4, "batch_size": 4, "learning_rate": 0.3},
    {"virtual_tokens": 7, "batch_size": 1, "learning_rate": 0.1, "seed": 3, "steps": 15},
    {"method": "prompt", "virtual_tokens": 3, "batch_size": 2, "learning_rate": 0.5, "seed": 5},
    {"virtual_tokens": 2, "batch_size": 8, "learning_rate": 0.2, "seed": 7, "steps": 40},
]

CLIP = 0.05  # so that there is something to clip


@pytest.fixture(autouse=True)
def low_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "CLIP", CLIP)


def runs() -> list[Tuning]:
    return [make(EXAMPLES[number:], **options) for number, options in enumerate(JOBS)]


def prefixes(tunings: list[Tuning]) -> list[torch.Tensor]:
    return [next(iter(run.result().tensors.values())) for run in tunings]


def largest(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def alone() -> tuple[list[torch.Tensor], list[list[float]]]:
    tunings = runs()
    losses = [[step.step(FROZEN, [run])[0] for _ in range(STEPS)] for run in tunings]
    return prefixes(tunings), losses


def test_sharing_a_step_is_training_alone() -> None:
    apart, losses = alone()
    together = runs()
    found = [step.step(FROZEN, together) for _ in range(STEPS)]
    assert largest(prefixes(together), apart) < 1e-5
    torch.testing.assert_close(torch.tensor(found).T, torch.tensor(losses), atol=1e-5, rtol=0)


@pytest.mark.parametrize("wrong", ["one mean over all tokens", "one clipping over all prefixes"])
def test_it_would_show_if_runs_touched_one_another(wrong: str) -> None:
    apart, _ = alone()
    together = runs()
    for _ in range(STEPS):
        groups = [run.group() for run in together]
        every = forward.logits(FROZEN, groups)
        nats = [objective.nats(logits, group.labels) for logits, group in zip(every, groups, strict=True)]
        counts = [len(group.labels) for group in groups]
        means = [sum(counts) if wrong.startswith("one mean") else count for count in counts]
        torch.stack([loss / count for loss, count in zip(nats, means, strict=True)]).sum().backward()
        if wrong.startswith("one clipping"):
            torch.nn.utils.clip_grad_norm_([p for run in together for p in run.method.parameters()], CLIP)
        for run in together:
            run.update(0.0)
    assert largest(prefixes(together), apart) > 1e-3


def test_runs_may_come_and_go() -> None:
    apart, _ = alone()
    first, second, third, fourth = together = runs()
    for number in range(2 * STEPS):
        active = [first, second] if number < 6 else [first, third, fourth]
        active = active if number < STEPS else [second, third, fourth]
        step.step(FROZEN, [run for run in active if run.step < STEPS])
    assert {run.step for run in together} == {STEPS}
    assert largest(prefixes(together), apart) < 1e-5


def test_an_idle_prefix_keeps_its_bits() -> None:
    busy, idle = make(), make(seed=1)
    step.step(FROZEN, [busy, idle])
    before = [parameter.clone() for parameter in idle.method.parameters()]
    for _ in range(3):
        step.step(FROZEN, [busy])
    assert all(torch.equal(a, b) for a, b in zip(before, idle.method.parameters(), strict=True))
    assert idle.step == 1


def test_who_diverges_is_alone_in_it() -> None:
    apart, losses = alone()
    together, sick = runs(), make()
    sick.method.parameters()[0].data[:] = float("nan")
    found = [step.step(FROZEN, [*together[:2], sick, *together[2:]]) for _ in range(STEPS)]
    assert all(isinstance(each.pop(2), FloatingPointError) for each in found)
    assert sick.step == 0
    assert largest(prefixes(together), apart) < 1e-5
    torch.testing.assert_close(torch.tensor(found).T, torch.tensor(losses), atol=1e-5, rtol=0)


@pytest.mark.parametrize("culprit", [1, None])
def test_memory_too_little_for_all_may_do_for_each(culprit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    apart, _ = alone()
    together, losses = runs(), forward.losses

    def scarce(frozen, groups):
        mine = groups[0].examples
        if len(groups) > 1 or (culprit is not None and len(mine) == JOBS[culprit]["batch_size"]):
            raise torch.OutOfMemoryError("no more")
        return losses(frozen, groups)

    monkeypatch.setattr(forward, "losses", scarce)
    for _ in range(STEPS):
        found = step.step(FROZEN, together)
        failed = [number for number, outcome in enumerate(found) if isinstance(outcome, torch.OutOfMemoryError)]
        assert failed == ([culprit] if culprit is not None else [])
    well = [number for number in range(len(JOBS)) if number != culprit]
    assert largest([prefixes(together)[n] for n in well], [apart[n] for n in well]) < 1e-5


def test_what_failed_leaves_nothing_behind_that_takes_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def greedy(frozen, groups):
        assert all(held() is None for held in kept), "the one before would take the memory of this one"
        large = torch.zeros(1000)
        kept.append(weakref.ref(large))
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(forward, "losses", greedy)
    told: list[Exception] = []
    found = step.step(FROZEN, runs(), told.append)
    assert [type(error) for error in found] == [torch.OutOfMemoryError] * len(JOBS)
    assert [type(error) for error in told] == [torch.OutOfMemoryError]
    assert len(kept) == 1 + len(JOBS)


def test_a_run_without_gradient_ends_and_the_rest_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = make(), make(seed=1)
    monkeypatch.setattr(bad.method, "layers_without_gradient", lambda: [1])
    loss, error = step.step(FROZEN, [good, bad])
    assert isinstance(loss, float)
    assert "layers [1]" in str(error)
    assert (good.step, bad.step) == (1, 0)


def test_passes_that_are_scored_together_have_the_losses_they_have_alone() -> None:
    def passes() -> list[Validation]:
        return [
            Validation(EXAMPLES[n:], size, rows)
            for n, (size, rows) in enumerate(
                [(5, None), (3, make().method.rows), (12, make(virtual_tokens=6).method.rows)]
            )
        ]

    apart = passes()
    for one in apart:
        while not one.done:
            one.add(*step.score(FROZEN, [one]))
    together = passes()
    while any(not one.done for one in together):
        some = [one for one in together if not one.done]
        for one, nats in zip(some, step.score(FROZEN, some), strict=True):
            one.add(nats)
    torch.testing.assert_close([one.loss for one in together], [one.loss for one in apart], atol=1e-5, rtol=0)
    assert len({round(one.loss, 3) for one in apart}) == 3
