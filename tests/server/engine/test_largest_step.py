"""The step that memory is set aside for is no smaller than any that requests make an engine take."""

from __future__ import annotations

import random
import weakref
from collections.abc import Sequence

import pytest
import torch

from server.engine import largest_step, sampler
from server.engine.batch import Selection
from server.engine.engine import Engine, least_slots
from server.engine.sampled import Sampled
from server.scheduler.limits import Limits
from server.scheduler.messages import GenerationRequest
from server.scheduler.sampling_params import SamplingParams
from tests.models import CONTEXT, VOCABULARY, tiny_frozen

SIZES = [{"rows": 4, "step_tokens": 64}, {"rows": 7, "step_tokens": 61}, {"rows": 3, "step_tokens": 700}]


class Seen:
    """Shapes of what an engine computes."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        self.logits: list[int] = []
        self.sampled: list[int] = []
        self.keys: list[int] = []
        self.read: list[int] = []
        run = engine.runner.run

        def seen(batch):
            self.tokens.append(len(batch.slots))
            self.keys.append(max(int(line[5] - line[4]) for line in batch.work[0].tolist()))
            self.read.append(batch.sources.token_ids.numel() if batch.sources is not None else 0)
            return run(batch)

        def sample(logits: torch.Tensor, selections: Sequence[Selection]) -> Sampled:
            sampled = sampler.sample(logits, selections)
            assert not [result for result in sampled.read() if result.error is not None]
            self.logits.append(len(logits))
            self.sampled.append(sum(selection.row.samples for selection in selections))
            return sampled

        monkeypatch.setattr(engine.runner, "run", seen)
        monkeypatch.setattr("server.engine.engine.sample", sample)

    def most(self) -> list[int]:
        return [max(numbers) for numbers in (self.tokens, self.logits, self.sampled, self.keys, self.read)]


def make(family: str, **sizes: int) -> Engine:
    frozen = tiny_frozen(family)
    numbers = {"slots": least_slots(frozen), "context_length": frozen.context_length, "waiting": 100}
    return Engine(frozen, Limits(**numbers, **sizes), clock=lambda: 0.0)


@pytest.mark.parametrize("sizes", SIZES)
def test_it_has_every_token_scored_and_every_row_sampled_and_the_whole_context_in_sight(sizes, monkeypatch):
    engine = make("llama", **sizes)
    seen = Seen(engine, monkeypatch)
    largest_step.run(engine)
    tokens, rows = sizes["step_tokens"], sizes["rows"]
    assert seen.most() == [tokens, tokens, rows, CONTEXT, 0]


@pytest.mark.parametrize(
    ("family", "sizes"), [("llama", SIZES[0]), ("llama", SIZES[2]), ("bart", SIZES[0]), ("t5", SIZES[2])]
)
def test_no_step_of_real_requests_is_larger(family, sizes, monkeypatch):
    engine = make(family, **sizes)
    with monkeypatch.context() as patch:
        seen = Seen(engine, patch)
        largest_step.run(engine)
        largest = seen.most()
    engine.resize(8 * engine.limits.slots)
    seen, draw = Seen(engine, monkeypatch), random.Random(0)
    for index in range(30):
        prompt = draw.choice([1, 5, 20, 300, engine.limits.context_length - 2])
        source = draw.choice([1, 30, engine.limits.context_length]) if engine.frozen.is_encoder_decoder else 0
        scored = {"echo": True, "logprobs": 3} if draw.random() < 0.6 else {}
        params = SamplingParams(max_tokens=draw.choice([1, 2]), seed=index, **scored)
        ids = tuple(draw.randrange(3, VOCABULARY) for _ in range(prompt))
        engine.scheduler.add(GenerationRequest(f"{index}", "t", ids, params, source_ids=ids[:1] * source), seed=index)
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.step()
    found = seen.most()
    assert all(one <= most for one, most in zip(found, largest, strict=True)), (found, largest)
    assert found[0] > largest[0] / 2, "a comparison with hardly anything"


def test_the_old_pool_is_gone_before_a_new_one_is_made(monkeypatch):
    """There may be room for one of them alone."""
    engine = make("llama", **SIZES[0])
    old = weakref.ref(engine.pool.keys)
    assert old() is not None
    make_pool, was_there = engine._pool, {}

    def seen(slots: int):
        was_there[slots] = old() is not None
        return make_pool(slots)

    monkeypatch.setattr(engine, "_pool", seen)
    engine.resize(1000)
    assert was_there == {0: True, 1000: False}


def test_what_comes_after_it_is_not_changed():
    engine = make("llama", **SIZES[0])
    request = GenerationRequest("r", "t", (5, 6, 7), SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))

    def answer() -> list[int]:
        engine.scheduler.add(request, seed=0)
        events = []
        while engine.scheduler.running or engine.scheduler.waiting:
            events += engine.step()
        return [token for event in events for token in event.token_ids]

    before = answer()
    largest_step.run(engine)
    assert answer() == before
    engine.resize(2 * engine.limits.slots)
    assert answer() == before
    assert engine.pool.slots == engine.scheduler.slots.total == engine.limits.slots == engine.runner.pool.slots
    engine.scheduler.check_integrity()
