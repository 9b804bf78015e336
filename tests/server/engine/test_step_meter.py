from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from server.engine.step_meter import StepMeter
from server.scheduler.messages import GenerationRequest, PrefixPayload
from server.scheduler.plan import Row, StepPlan
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.sequence import Sequence


def row(start: int, count: int, *, tokens: int = 3, prefix: str | None = None, **params: Any) -> Row:
    """Of a sequence with a prompt of 3 tokens, and of so many tokens by now."""
    payload = PrefixPayload(prefix, 4, 4, False, None) if prefix is not None else None
    chosen = SamplingParams(**{"max_tokens": 9, "echo": True, **params})
    sequence = Sequence(GenerationRequest("r", "t", (5, 6, 7), chosen, payload), 0)
    sequence.tokens += range(tokens - 3)
    return Row(sequence, start, count)


def count(meter: StepMeter, *rows: Row, begun: float = 0.0, now: float = 1.0) -> None:
    meter.count(StepPlan((), rows), begun, now)


def test_prompts_answers_and_prefixes_are_told_apart():
    meter = StepMeter()
    count(meter, row(0, 2, prefix="a"), row(0, 3, prefix="b"), row(3, 1, tokens=4, prefix="b"), row(4, 1, tokens=5))
    assert (meter.steps, meter.prompt_tokens, meter.generated_tokens, meter.distinct_prefixes) == (1, 5, 3, 2)
    assert (meter.rows.read().total, meter.tokens.read().total, meter.prefixes.read().total) == (4, 7, 2)


def test_a_prompt_that_is_only_scored_generates_nothing():
    meter = StepMeter()
    count(meter, row(0, 3, max_tokens=0))
    assert (meter.prompt_tokens, meter.generated_tokens) == (3, 0)


def test_rows_that_decode_waited_since_the_step_before():
    meter = StepMeter()
    count(meter, row(0, 3), row(0, 3), now=10.0)
    assert meter.gaps.read().counts[-1] == 0
    count(meter, row(3, 1, tokens=4), row(3, 1, tokens=4), row(0, 2), begun=10.1, now=10.5)
    assert (meter.gaps.read().counts[-1], meter.gaps.read().total) == (2, pytest.approx(1.0))
    assert meter.seconds.read().total == pytest.approx(10.4)


def test_a_step_that_was_launched_behind_another_takes_what_it_takes_after_that():
    meter = StepMeter()
    count(meter, row(0, 3), begun=9.0, now=10.0)
    count(meter, row(3, 1, tokens=4), begun=9.5, now=10.25)
    assert meter.seconds.read().total == pytest.approx(1.25)


def test_what_is_computed_again_after_a_preemption_is_no_gap():
    meter = StepMeter()
    count(meter, row(0, 6, tokens=6))
    assert meter.gaps.read().counts[-1] == 0
    assert (meter.prompt_tokens, meter.generated_tokens) == (6, 1)


def test_the_meter_counts_what_rows_say_of_themselves():
    """It reads their fields itself, for speed."""
    meter = StepMeter()
    places = [(tokens, start) for tokens in (3, 5) for start in range(tokens)]
    parts = [(tokens, start, size) for tokens, start in places for size in range(1, tokens - start + 1)]
    rows = [row(start, size, tokens=tokens, max_tokens=most) for tokens, start, size in parts for most in (0, 4)]
    count(meter, *rows)
    assert meter.generated_tokens == sum(one.samples and not one.sequence.is_mute for one in rows)
    assert meter.tokens.read().total == sum(one.cost for one in rows)


def test_a_source_counts_with_the_step_that_reads_it():
    meter = StepMeter()
    unread = row(0, 1)
    object.__setattr__(unread.sequence, "request", SimpleNamespace(**vars(unread.sequence.request), source_length=40))
    count(meter, unread)
    assert meter.prompt_tokens == 41


def test_a_step_without_rows_is_none():
    meter = StepMeter()
    count(meter)
    assert (meter.steps, meter.rows.read().counts[-1]) == (0, 0)
