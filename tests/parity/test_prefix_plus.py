"""A row with a memory is the reference's own, whatever its neighbours use: prefixes, soft prompts, other memories."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from prefix_store.errors import PrefixNumerics
from prefix_store.model import apply
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.memory import FEATURE_MAPS, Memory
from prefix_store.prefix import Window
from server.engine.engine import Engine
from server.scheduler.messages import FinishReason, PrefixPayload
from server.scheduler.plan import Load
from tests.models import FAMILIES, VOCABULARY, random_kv, random_memory, tiny_frozen
from tests.parity.harness import (
    TOLERANCE,
    Case,
    backends,
    make_engine,
    memory_payload,
    payload,
    recorded,
    request,
    run_mixed,
    sampled,
    worst_difference,
)
from tests.parity.test_prompts import soft_prompt

P = 5
Known = tuple[list[int], torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """A prefix as the engine takes it, and the same for the reference: KV of any length, and a memory."""

    served: PrefixPayload | None
    kv: torch.Tensor
    memory: Memory | None = None


@torch.no_grad()
def kinds(reference: FrozenModel) -> dict[str, Kind]:
    """One prefix of every method, and memories that differ in their numbers or in their phi alone."""
    nothing, kv = random_kv(reference, 0), random_kv(reference, P)
    soft = soft_prompt(reference.model, P)
    made = {
        "none": Kind(None, nothing),
        "kv": Kind(payload(kv, "kv"), kv),
        "soft": Kind(PrefixPayload("soft", P, P, True, soft, is_embeds=True), apply.prefill_embeds(reference, soft)),
    }
    for name, seed, feature_map in (("elu", 1, "elu"), ("gelu", 1, "gelu"), ("other", 2, "elu")):
        memory = random_memory(reference, seed)
        made[name] = Kind(memory_payload(reference, memory, name, feature_map), nothing, Memory(memory, feature_map))
    return made


@torch.no_grad()
def alone(reference: FrozenModel, case: Case, kind: Kind) -> Known:
    """Greedy tokens and their logits `[new, V]` by the reference, the whole row computed again for every token."""
    ids, found = list(case.prompt), []
    length = kind.kv.shape[3]
    rows = apply.PrefixRows.stack([kind.kv], [length], [Window.SLIDES], [kind.memory])
    for _ in range(case.new):
        row = torch.tensor([ids])
        found.append(apply.logits(reference, row, torch.ones_like(row), rows)[0, -1])
        ids.append(int(found[-1].argmax()))
    return ids[len(case.prompt) :], torch.stack(found)


@dataclass(frozen=True)
class Scene:
    """Requests of every kind, and what the reference says to each alone."""

    family: str
    served: FrozenModel
    cases: list[Case]
    prefixes: list[PrefixPayload | None]
    expected: list[Known]

    def run(self, engine: Engine, prefixes: list[PrefixPayload | None] | None = None) -> float:
        """The worst difference of any logit; the tokens are compared too where the prefixes are the right ones."""
        tokens = run_mixed(engine, self.cases, self.prefixes if prefixes is None else prefixes)
        if prefixes is None:
            assert [tokens[str(i)] for i in range(len(self.cases))] == [known for known, _ in self.expected]
        return worst_difference(engine, [logits for _, logits in self.expected])


@pytest.fixture(scope="module", name="scene", params=sampled(FAMILIES))
def each_family(request: pytest.FixtureRequest) -> Scene:
    reference, draw = apply.attach(tiny_frozen(request.param)), random.Random(0)
    known = kinds(reference)
    # neighbours in time use one memory, and each comes back after others may have pushed it out
    order = ["elu", "kv", "gelu", "elu", "none", "other", "soft", "other", "gelu", "elu"]
    cases = [
        Case(tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.choice([1, 4, 17]))), None, new=6, arrives=index)
        for index in range(len(order))
    ]
    expected = [alone(reference, case, known[name]) for case, name in zip(cases, order, strict=True)]
    return Scene(request.param, tiny_frozen(request.param), cases, [known[name].served for name in order], expected)


@pytest.mark.parametrize("backend", backends())
def test_mixed_rows_equal_the_reference_alone(scene, backend, record_worst):
    # room for two memories at most beside the rows: some are evicted and brought in again
    taken = next(prefix.slots for prefix in scene.prefixes if prefix is not None and prefix.memory_slots)
    engine = make_engine(scene.served, backend, step_tokens=9, rows=3, slots=2 * taken + 40)
    worst = scene.run(engine)
    residency = engine.scheduler.residency
    assert residency.evictions > 0
    assert residency.misses > 5  # more than there are prefixes
    record_worst(f"{scene.family}, memories", worst)
    assert worst < TOLERANCE


def wrong_phi(prefix: PrefixPayload) -> PrefixPayload:
    other = {"elu": "gelu", "gelu": "elu"}
    return replace(prefix, feature_map=other[prefix.feature_map])


WRONG: dict[str, Callable[[PrefixPayload], PrefixPayload]] = {
    "phi": wrong_phi,
    "heads in another order": lambda prefix: replace(prefix, tensor=prefix.tensor.flip(1)),
    "layers in another order": lambda prefix: replace(prefix, tensor=prefix.tensor.flip(0)),
    "transposed": lambda prefix: replace(prefix, tensor=prefix.tensor.transpose(2, 3)),
    "none": lambda prefix: replace(prefix, tensor=torch.zeros_like(prefix.tensor)),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_memory_that_is_wrong_fails_the_check(scene, what):
    change = WRONG[what]
    wrong = [change(prefix) if prefix is not None and prefix.memory_slots else prefix for prefix in scene.prefixes]
    assert scene.run(make_engine(scene.served), wrong) > 100 * TOLERANCE


def test_another_row_s_memory_fails_the_check(scene):
    turned = scene.prefixes[1:] + scene.prefixes[:1]
    assert scene.run(make_engine(scene.served), turned) > 100 * TOLERANCE


@pytest.mark.parametrize("backend", backends())
def test_a_memory_of_zeros_is_the_bare_model_to_the_last_bit(scene, backend):
    zeros = memory_payload(scene.served, torch.zeros_like(random_memory(scene.served)), "zeros")
    engines = []
    for prefix in (zeros, None):
        engines.append(make_engine(scene.served, backend, step_tokens=9))
        run_mixed(engines[-1], scene.cases, [prefix] * len(scene.cases))
    for index in range(len(scene.cases)):
        assert torch.equal(recorded(engines[0], str(index)), recorded(engines[1], str(index)))


def test_a_row_decodes_on_while_memories_come_and_go():
    """Two memories take turns where there is room for one, beside a row that keeps a third and one that has none."""
    served, reference = tiny_frozen("llama"), apply.attach(tiny_frozen("llama"))
    known = kinds(reference)
    long = [Case((5, 6, 7), None, new=60), Case((8, 9), None, new=60)]
    short = [Case((10 + index,), None, new=3, arrives=5 + 8 * index) for index in range(6)]
    cases, order = [*long, *short], ["other", "none", *["elu", "gelu"] * 3]
    taken = known["elu"].served.slots
    engine = make_engine(served, slots=2 * taken + 62 + 61 + 3, rows=3)
    loads: Counter[str] = Counter()
    run = engine.launch

    def counting(plan):
        loads.update(transfer.payload.digest for transfer in plan.transfers if isinstance(transfer, Load))
        return run(plan)

    engine.launch = counting
    tokens = run_mixed(engine, cases, [known[name].served for name in order])
    assert loads == {"other": 1, "elu": 3, "gelu": 3}
    assert engine.scheduler.admission.preemptions == 0
    expected = [alone(reference, case, known[name]) for case, name in zip(cases, order, strict=True)]
    assert [tokens[str(index)] for index in range(len(cases))] == [ids for ids, _ in expected]
    assert worst_difference(engine, [logits for _, logits in expected]) < TOLERANCE


@pytest.mark.parametrize("backend", backends())
def test_a_row_s_tokens_do_not_depend_on_who_shares_its_memory(backend):
    served = tiny_frozen("llama")
    memory = memory_payload(served, random_memory(served), "m")
    prompts = [tuple(range(10 * row, 10 * row + 7)) for row in range(1, 10)]
    cases = [Case(prompt, None, new=8, arrives=row) for row, prompt in enumerate(prompts)]
    together = make_engine(served, backend)
    tokens = run_mixed(together, cases, [memory] * len(cases))
    for index, case in enumerate(cases):
        single = make_engine(served, backend)
        assert run_mixed(single, [replace(case, arrives=0)], [memory])["0"] == tokens[str(index)]
        difference = (recorded(single, "0") - recorded(together, str(index))).abs().max()
        assert difference < TOLERANCE  # observed 0.0 with MKL


def test_a_finite_memory_that_overflows_fails_alone_and_leaves_its_neighbours_bits():
    served = tiny_frozen("llama")
    fine = memory_payload(served, random_memory(served), "fine")
    huge = memory_payload(served, torch.full_like(fine.tensor, 3e38), "huge")
    kept = memory_payload(served, random_memory(served, seed=7), "kept")
    good, bare, other = (Case(tuple(range(start, start + 6)), None, new=5) for start in (10, 20, 30))
    ends, engines = [], []
    for third in (fine, huge):
        engine = make_engine(served)
        for index, (case, prefix) in enumerate([(good, kept), (bare, None), (other, third)]):
            engine.scheduler.add(request(str(index), case, prefix), seed=0)
        events = []
        while engine.scheduler.waiting or engine.scheduler.running:
            events += engine.step()
        ends.append({event.request_id: event for event in events if event.finish_reason is not None})
        engines.append(engine)
    assert ends[0]["2"].finish_reason is FinishReason.LENGTH
    assert ends[1]["2"].finish_reason is FinishReason.ERROR
    assert isinstance(ends[1]["2"].error, PrefixNumerics)
    for name in ("0", "1"):
        beside_fine, beside_huge = (recorded(engine, name) for engine in engines)
        assert torch.equal(beside_fine[0], beside_huge[0])
        assert torch.equal(beside_fine.argmax(-1), beside_huge.argmax(-1))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_half_precision_is_the_reference_to_its_rounding(feature_map):
    reference, served = apply.attach(tiny_frozen("llama")), tiny_frozen("llama")
    served.model.to(torch.bfloat16)
    memory, case = random_memory(reference), Case(tuple(range(40, 50)), None, new=1)
    kind = Kind(None, random_kv(reference, 0), Memory(memory, feature_map))
    _, expected = alone(reference, case, kind)
    engine = make_engine(served)
    run_mixed(engine, [case], [memory_payload(served, memory.bfloat16(), "m", feature_map)])
    assert float((recorded(engine, "0") - expected).abs().max() / expected.abs().max()) < 0.1
