from __future__ import annotations

import json
import math
from functools import cache

import pytest
import torch
from safetensors.torch import load, save

from tests.trainer.runs import EXAMPLES, FROZEN, make
from trainer.step import step
from trainer.tuning import STATE_KEY, Fit, StateMismatch, Tuning, is_due

MODEL = "a" * 64


def go(tuning: Tuning, until: int, valid=lambda step: 5.0 - 0.1 * step) -> list[float]:
    """Steps it, judged by a made-up validation; the training losses."""
    losses = []
    while tuning.step < until:
        if tuning.due:
            tuning.judge(valid(tuning.step))
        losses += step(FROZEN, [tuning])
    if tuning.due:
        tuning.judge(valid(tuning.step))
    return losses


def same(first: Fit, second: Fit) -> bool:
    kept = [torch.equal(a, b) for a, b in zip(first.tensors.values(), second.tensors.values(), strict=True)]
    return all(kept) and (first.step, first.valid_loss, first.start_loss, first.bare_loss) == (
        second.step, second.valid_loss, second.start_loss, second.bare_loss
    )  # fmt: skip


@cache
def undisturbed(method: str) -> tuple[Tuning, list[float]]:
    whole = make(validates=True, method=method)
    whole.bare_loss = 6.0
    return whole, go(whole, 20)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("at", [0, 1, 7, 13, 20])
def test_cut_off_and_taken_up_again_it_ends_with_the_same_bits(method, at):
    whole, losses = undisturbed(method)
    cut = make(validates=True, method=method)
    cut.bare_loss = 6.0
    before = go(cut, at)
    again = make(validates=True, method=method)
    again.load(cut.to_bytes(MODEL), MODEL)
    assert (again.step, again.loss, again.due, again.done) == (cut.step, cut.loss, cut.due, cut.done)
    assert before + go(again, 20) == losses
    assert same(again.result(), whole.result())
    assert again.result().start_loss == 5.0


@pytest.mark.parametrize("lost", ["adam.0", "best", "position"])
def test_what_is_saved_is_needed(lost):
    """The control: without its moments, its best or its place in the data a run ends otherwise."""

    def valid(step: int) -> float:
        return abs(step - 6) if lost == "best" else 5.0 - step

    whole, cut, again = (make(validates=True) for _ in range(3))
    losses = go(whole, 20, valid)
    before = go(cut, 7, valid)
    data = cut.to_bytes(MODEL)
    text = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][STATE_KEY]
    again.load(save({n: t for n, t in load(data).items() if not n.startswith(lost)}, {STATE_KEY: text}), MODEL)
    if lost == "position":
        again._batches = make()._batches
    after = go(again, 20, valid)
    assert before + after != losses or not same(again.result(), whole.result())


def test_a_saved_state_does_not_move_with_the_run():
    tuning = make()
    go(tuning, 3)
    data = tuning.to_bytes(MODEL)
    go(tuning, 6)
    assert not torch.equal(load(data)["parameter.0"], tuning.method.parameters()[0])
    again = make()
    again.load(data, MODEL)
    assert torch.equal(load(data)["parameter.0"], again.method.parameters()[0])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: b"", "not a saved run"),
        (lambda: b"\x80\x04}.", "not a saved run"),
        (lambda: save({"parameter.0": torch.zeros(1)}), "not a saved run"),
        (lambda: make().to_bytes(MODEL)[:-4], "not a saved run"),
        (lambda: make().to_bytes("b" * 64), "another base model"),
        (lambda: make(virtual_tokens=9).to_bytes(MODEL), "other shapes"),
        (lambda: save({}, {STATE_KEY: json.dumps({"format": 1, "model": MODEL})}), "without 'parameter.0'"),
    ],
)
def test_bytes_of_another_run_are_refused_and_change_nothing(data, words):
    tuning = make(seed=3)
    with pytest.raises(StateMismatch, match=words):
        tuning.load(data(), MODEL)
    assert go(tuning, 4) == go(make(seed=3), 4)


def test_a_validation_is_due_at_the_start_and_ten_times():
    tuning, due = make(validates=True), []
    while not tuning.done:
        if tuning.due:
            due.append(tuning.step)
            tuning.judge(1.0)
            assert not tuning.due
        else:
            step(FROZEN, [tuning])
    assert due == [0, *range(2, 21, 2)]
    assert not make(validates=False).due


@pytest.mark.parametrize(("patience", "last"), [(0, 20), (1, 6), (3, 10), (8, 20), (9, 20)])
def test_it_ends_when_validation_has_lost_its_patience(patience, last):
    tuning = make(validates=True, patience=patience)
    while not tuning.done:
        if tuning.due:
            tuning.judge(abs(tuning.step - 4.0))  # best at step 4
        else:
            step(FROZEN, [tuning])
    assert (tuning.step, tuning.result().step) == (last, 4)


def test_equal_losses_keep_the_earlier_prefix():
    tuning = make(validates=True)
    go(tuning, 20, lambda step: 1.0)
    assert tuning.result().step == 0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused(loss):
    tuning = make(validates=True)
    with pytest.raises(FloatingPointError, match="validation loss became"):
        tuning.judge(loss)
    with pytest.raises(FloatingPointError, match="validation loss became"):
        tuning.bare_loss = loss
    assert tuning.due


def test_a_batch_that_failed_comes_again():
    tuning = make()
    first = tuning.group().examples
    assert tuning.group().examples is first
    step(FROZEN, [tuning])
    assert tuning.group().examples is not first
    assert tuning.batch_tokens == sum(len(example.ids) for example in first)


@pytest.mark.parametrize(
    ("fit", "improves"),
    [
        (Fit({}, 5, None, None), True),
        (Fit({}, 5, 1.9, 2.0, 3.0), True),
        (Fit({}, 5, 1.9, 2.0), True),
        (Fit({}, 5, 3.1, 4.0, 3.0), False),
        (Fit({}, 0, 2.0, 2.0, 3.0), False),  # its start is better than nothing, and no step was better than that
    ],
)
def test_what_is_worth_publishing_is_better_than_its_start_and_than_none(fit, improves):
    assert fit.improves is improves


@pytest.mark.parametrize(
    ("steps", "times", "due"),
    [
        (20, 10, list(range(2, 21, 2))),
        (19, 10, [2, 4, 6, 8, 10, 12, 14, 16, 18, 19]),
        (25, 3, [9, 18, 25]),
        (3, 10, [1, 2, 3]),
        (1, 10, [1]),
    ],
)
def test_what_is_due_is_spread_over_the_run(steps, times, due):
    assert [step for step in range(1, steps + 1) if is_due(step, steps, times)] == due


def test_tokens_that_were_shown_are_counted_across_a_cut():
    first = make(batch_size=4)
    shown = 0
    for _ in range(5):
        shown += sum(len(example.ids) for example in first.group().examples)
        step(FROZEN, [first])
        again = make(batch_size=4)
        again.load(first.to_bytes(MODEL), MODEL)
        first = again
    assert first.tokens == shown > 0


def test_every_example_is_seen_once_an_epoch_across_a_cut():
    first = make(batch_size=4)
    seen = []
    for _ in range(3):
        seen += first.group().examples
        step(FROZEN, [first])
        again = make(batch_size=4)
        again.load(first.to_bytes(MODEL), MODEL)
        first = again
    assert sorted(example.ids for example in seen) == sorted(example.ids for example in EXAMPLES)
