"""A model is compiled whole, as one graph for the steps of every bucket, and computes what it did."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from server.engine import attention
from server.engine.engine import Engine
from tests.models import FAMILIES, random_memory, tiny_frozen, tiny_model
from tests.parity.harness import TOLERANCE, a_few, alone, make_engine, memory_payload, run_mixed, worst_difference
from tests.parity.test_families import make_cases, payloads
from tests.server.engine import recording
from tests.server.engine.attention import listed

LIMITS = {"slots": 400, "rows": 9, "step_tokens": 32}


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    listed.pretend(monkeypatch, (2, 4, 16, 32))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(family: str, backend: str) -> Engine:
    engine = make_engine(tiny_frozen(family), listed.NAME, **LIMITS)
    runner = engine.runner._runner
    runner.compile(backend)
    runner.record(recording.again, engine.limits)
    return engine


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("family", a_few(FAMILIES))
def test_one_graph_serves_every_step(family: str) -> None:
    served, plain = tiny_frozen(family), tiny_model(family)
    cases = make_cases(served)
    engine = compiled(family, "eager")
    made = graphs()
    tokens = run_mixed(engine, cases, payloads(cases))
    truth = [alone(plain, case) for case in cases]
    assert [tokens[str(index)] for index in range(len(cases))] == [found for found, _ in truth]
    assert worst_difference(engine, [logits for _, logits in truth]) < TOLERANCE
    assert made == graphs() == 2  # with memories, and without


def test_it_lasts_through_what_torch_makes_of_writes_into_the_pool() -> None:
    served = tiny_frozen("llama")
    cases = make_cases(served)
    memory = memory_payload(served, random_memory(served, seed=1), "memory", "gelu")
    prefixes = [memory if i % 2 else found for i, found in enumerate(payloads(cases))]
    right = run_mixed(make_engine(served, "plain", **LIMITS), cases, prefixes)
    assert run_mixed(compiled("llama", "aot_eager"), cases, prefixes) == right


def test_a_model_that_is_not_one_graph_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny_frozen("llama"), listed.NAME, **LIMITS)
    attend = attention.AttentionInterface._global_mapping[attention.NAME]

    def waiting(*inputs: torch.Tensor, **options: object) -> tuple[torch.Tensor, None]:
        output, nothing = attend(*inputs, **options)
        return (output if output.max() > 0 else -output), nothing

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, waiting)
    runner = engine.runner._runner
    runner.compile("eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        runner.record(recording.again, engine.limits)
    monkeypatch.undo()
    runner.run_eagerly()
    assert "forward" not in vars(runner.frozen.model)
