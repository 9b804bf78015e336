"""A row of a mixed batch of an encoder-decoder model is the same request alone in transformers, stack by stack."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from prefix_store.geometry import Stack
from prefix_store.model import sites
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.memory import Memory
from server.scheduler.messages import FinishReason, PrefixPayload
from server.scheduler.sampling_params import SamplingParams
from tests.models import ENCODER_DECODERS, random_kvs, random_memory, tiny_frozen, tiny_model
from tests.parity.harness import Case, backends, make_engine, memory_payload, recorded, request, run_mixed
from tests.parity.stacks import Prefix, alone, logits

# Of the largest logit: float32 sums in another order give 1e-6; a wrong neighbour is off by parts of the whole.
TOLERANCE = 1e-5
WRONG = 1e-3
BYTES = range(3, 258)
SETS = [
    None,
    (Stack.SELF,),
    (Stack.CROSS,),
    (Stack.ENCODER,),
    tuple(Stack),
    (Stack.CROSS, Stack.ENCODER),
    (Stack.SELF, Stack.CROSS),
    tuple(Stack),
    "prompt",
    tuple(Stack),
]
# Rows 7 and 9 share a prefix, which has the length of row 4's.
LENGTHS = [0, 5, 1, 20, 7, 3, 11, 7, 6, 7]
FAMILIES = [pytest.param(name, marks=() if name in ("bart", "t5") else pytest.mark.slow) for name in ENCODER_DECODERS]


class Family:
    """A model to serve, cases of it, and what the plain model says of each."""

    def __init__(self, name: str) -> None:
        self.name, self.served, self.plain = name, tiny_frozen(name), tiny_model(name)
        sites.mark(self.plain)
        self.cases, self.prefixes = make_cases(self.served)
        self.expected = [alone(self.plain, *pair) for pair in zip(self.cases, self.prefixes, strict=True)]

    def payloads(self) -> list[PrefixPayload | None]:
        """Rows of equal stacks, length and offset share one prefix."""
        triples = zip(SETS, LENGTHS, self.prefixes, strict=True)
        return [
            prefix.payload(f"{kind} {length} {prefix.offset}") if kind else None for kind, length, prefix in triples
        ]

    def run(self, payloads: list[PrefixPayload | None], backend: str | None = None, **limits: int):
        engine = make_engine(self.served, backend, **limits)
        return engine, run_mixed(engine, self.cases, payloads)

    def worst(self, engine) -> float:
        """The largest difference of any logit, in parts of the row's largest."""
        found = [
            (recorded(engine, str(index)) - expected).abs().max() / expected.abs().max()
            for index, (_, expected) in enumerate(self.expected)
        ]
        return float(torch.stack(found).nan_to_num(torch.inf, posinf=torch.inf).max())


def make_cases(model: FrozenModel, seed: int = 0) -> tuple[list[Case], list[Prefix]]:
    """Ten requests over eight prefixes of all sets of stacks, arriving over a dozen steps."""
    draw, cases, prefixes = random.Random(seed), [], []
    for index, (kind, length) in enumerate(zip(SETS, LENGTHS, strict=True)):
        if kind == "prompt":
            generator = torch.Generator().manual_seed(seed)
            prefixes.append(Prefix(embeds=torch.randn(length, model.geometry.hidden_size, generator=generator)))
        elif kind is None:
            prefixes.append(Prefix())
        else:
            offset = length if index % 2 else 0
            prefixes.append(Prefix(random_kvs(model, length, seed=length + offset, stacks=kind), offset))
        source = tuple(draw.choices(BYTES, k=draw.choice([1, 4, 9, 30])))
        new, arrives = draw.choice([3, 6, 12]), draw.randrange(0, 12)
        cases.append(Case((model.start_id,), None, new, arrives, f"{index}", source))
    return cases, prefixes


@pytest.fixture(scope="module", name="family", params=FAMILIES)
def each_family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


SCHEDULES = {
    "roomy": {},
    "few tokens a step": {"step_tokens": 5, "rows": 4},
    "preempting": {"slots": 100, "rows": 9, "step_tokens": 16},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("backend", backends())
def test_mixed_rows_equal_the_request_alone(family, schedule, backend, monkeypatch):
    if schedule == "preempting":
        # without headroom every answer outgrows its extent, so rows are moved and preempted all the time
        monkeypatch.setattr("server.scheduler.admission.HEADROOM", 1)
    engine, tokens = family.run(family.payloads(), backend, **SCHEDULES[schedule])
    assert [tokens[str(index)] for index in range(len(SETS))] == [ids for ids, _ in family.expected]
    assert family.worst(engine) < TOLERANCE
    assert (engine.scheduler.admission.preemptions > 0) == (schedule == "preempting")
    assert (engine.scheduler.residency.evictions > 0) == (schedule == "preempting")


def swapped(family: Family, stack: Stack) -> list[PrefixPayload | None]:
    """Payloads in which two rows have one another's keys and values of a single stack."""
    payloads = family.payloads()
    for index, other in ((4, 7), (7, 4)):
        stacks = {**family.prefixes[index].stacks, stack: family.prefixes[other].stacks[stack]}
        payloads[index] = replace(family.prefixes[index], stacks=stacks).payload(f"swapped {index}")
    return payloads


@pytest.mark.parametrize("stack", Stack)
def test_each_stack_swapped_between_two_rows_fails_the_check(family, stack):
    engine, _ = family.run(swapped(family, stack))
    assert family.worst(engine) > WRONG


def test_another_soft_prompt_fails_the_check(family):
    payloads = family.payloads()
    payloads[SETS.index("prompt")] = replace(family.prefixes[SETS.index("prompt")], embeds=torch.zeros(6, 48)).payload(
        "0"
    )
    engine, _ = family.run(payloads)
    assert family.worst(engine) > WRONG


def test_a_source_in_another_rows_slots_fails_the_check(family, monkeypatch):
    """The cross-attention alone reads them, once the encoder has run."""
    from server.engine import batch

    def misplaced(rows):
        return [replace(item, kv_hi=item.kv_hi - 1) if item.kv_hi - item.kv_lo > 1 else item for item in found(rows)]

    found = batch.cross_items
    monkeypatch.setattr(batch, "cross_items", misplaced)
    # the self-test at load refuses it, too
    monkeypatch.setattr("server.engine.self_test.check", lambda *_: None)
    engine, _ = family.run(family.payloads())
    assert family.worst(engine) > WRONG


def test_a_position_off_by_one_fails_the_check_where_there_are_positions(family):
    shifted = [replace(p, position_offset=p.position_offset + 1) if p else None for p in family.payloads()]
    engine, _ = family.run(shifted)
    assert (family.worst(engine) > WRONG) != family.served.is_relative


def test_neighbours_full_of_nan_change_nothing(family):
    clean = (0, 4)
    payloads = [
        replace(p, **{name: torch.full_like(kv, torch.nan) for name, kv in tensors(p).items()})
        if p is not None and index not in clean
        else p
        for index, p in enumerate(family.payloads())
    ]
    engine = make_engine(family.served)
    for stack in Stack:
        for pool in engine.pool.of(stack):
            pool.fill_(torch.nan)
    for index, case in enumerate(family.cases):
        engine.scheduler.add(request(str(index), case, payloads[index]), seed=0)
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.step()
    for index in clean:
        expected = family.expected[index][1]
        assert float((recorded(engine, str(index)) - expected).abs().max()) < TOLERANCE * float(expected.abs().max())


def tensors(payload: PrefixPayload) -> dict[str, torch.Tensor]:
    found = {"tensor": payload.tensor, "cross": payload.cross, "encoder": payload.encoder}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@torch.inference_mode()
def test_what_rows_are_held_to_is_what_a_cache_of_transformers_makes_of_the_same_prefix(family):
    """Without the encoder's stack, of which transformers has no cache: the decoder's own, whose length moves it on."""
    plain, source, length = tiny_model(family.name), (7, 8, 9, 10), 5
    stacks = random_kvs(family.served, length, seed=3, stacks=(Stack.SELF,))
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for layer, kv in enumerate(stacks[Stack.SELF]):
        cache.self_attention_cache.update(kv[0][None].clone(), kv[1][None].clone(), layer)
    ids = [family.served.start_id, 20, 30]
    output = plain(
        input_ids=torch.tensor([source]),
        decoder_input_ids=torch.tensor([ids]),
        decoder_attention_mask=torch.ones(1, length + len(ids)),
        past_key_values=cache,
    )
    ours = logits(family.plain, source, ids, Prefix(stacks, length))
    assert float((ours - output.logits[0]).abs().max()) < TOLERANCE * float(ours.abs().max())


def test_a_memory_adds_to_the_decoders_own_attention(family):
    memory = random_memory(family.served)
    case = Case((family.served.start_id,), None, 6, source=(5, 6, 7))
    engine = make_engine(family.served)
    tokens = run_mixed(engine, [case, case], [memory_payload(family.served, memory, "m"), None])
    for index, prefix in enumerate((Prefix(memory=Memory(memory, "elu")), Prefix())):
        ids, expected = alone(family.plain, case, prefix)
        assert tokens[str(index)] == ids
        assert float((recorded(engine, str(index)) - expected).abs().max()) < TOLERANCE * float(expected.abs().max())


def test_another_version_takes_the_prefixs_place_while_rows_decode(family):
    """Rows that had begun keep theirs; later ones have the new one; nobody the other's."""
    kinds = tuple(Stack)
    old, new = (Prefix(random_kvs(family.served, 7, seed=seed, stacks=kinds), 7) for seed in (1, 2))
    start = (family.served.start_id,)
    cases = [Case(start, None, 12, arrives=at, source=(9, 8, 7, 6, at + 3)) for at in (0, 2, 4, 5)]
    prefixes = [old, old, new, new]
    engine = make_engine(family.served, slots=150)
    tokens = run_mixed(engine, cases, [prefix.payload("old" if prefix is old else "new") for prefix in prefixes])
    for index, (case, prefix) in enumerate(zip(cases, prefixes, strict=True)):
        assert tokens[str(index)] == alone(family.plain, case, prefix)[0]
    wrong = alone(family.plain, cases[2], old)[1]
    assert float((recorded(engine, "2") - wrong).abs().max()) > WRONG * float(wrong.abs().max())


def test_an_aborted_row_gives_back_both_its_extents_at_once(family):
    engine = make_engine(family.served)
    prefix = Prefix(random_kvs(family.served, 7, seed=1, stacks=tuple(Stack)), 7)
    case = Case((family.served.start_id,), None, 50, source=tuple(range(5, 25)))
    for name in ("a", "b"):
        engine.scheduler.add(request(name, case, prefix.payload("p")), seed=0)
    for _ in range(3):
        engine.step()
    held, row = engine.scheduler.slots.used, engine.scheduler.running[0]
    assert row.source.size == 20
    size = row.source.size + row.extent.size
    assert engine.scheduler.abort(row.request.id, FinishReason.ABORT) is not None
    engine.scheduler.check_integrity()
    assert engine.scheduler.slots.used == held - size
    assert engine.scheduler.abort("b", FinishReason.ABORT) is not None
    assert engine.scheduler.slots.used == prefix.payload("p").slots == 14


@pytest.mark.parametrize("length", [1, 4, 9])
def test_answers_are_transformers_own_by_the_rules_of_the_generation_config(family, length):
    """A forced beginning, a forced end, tokens that may not come: those of the models that are published."""
    model, source = tiny_model(family.name), tuple(range(40, 60))
    # its caches have as many layers as T5's encoder, so there is none
    greedy = {"do_sample": False, "use_cache": False}
    free = model.generate(torch.tensor([source]), min_new_tokens=6, max_new_tokens=6, **greedy)[0].tolist()
    rules = {"forced_bos_token_id": 7, "forced_eos_token_id": 1, "bad_words_ids": [[free[-1]]]}
    served = tiny_frozen(family.name)
    for config in (model.generation_config, served.model.generation_config):
        config.update(**rules)
    expected = model.generate(torch.tensor([source]), max_new_tokens=1 + length, **greedy)[0].tolist()
    assert free[-1] not in expected
    engine = make_engine(served)
    params = SamplingParams(max_tokens=length, temperature=0.0)
    case = Case(served.start_ids, None, length, source=source)
    rules = {"last_id": served.last_id, "banned_ids": served.banned_ids}
    engine.scheduler.add(replace(request("a", case, None), params=params, **rules), seed=0)
    events = []
    while engine.scheduler.running or engine.scheduler.waiting:
        events += engine.step()
    tokens = [token for event in events for token in event.token_ids]
    assert [*served.start_ids, *tokens, 1] == expected
    assert events[-1].finish_reason is (FinishReason.LENGTH if len(expected) == length + 2 else FinishReason.STOP)
