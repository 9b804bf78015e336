"""A small sample of every section: it runs to its end, what must agree agrees, and its table can be drawn."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from prefix_store.geometry import Stack
from prefix_store.model.frozen import measure
from tests.bench import (
    agreement,
    encoder_decoder,
    encoder_decoder_peers,
    fair,
    flat,
    growth,
    http,
    latency,
    long,
    machine,
    peers,
    results,
    throughput,
    training,
)
from tests.bench.arms import BARE, CACHED, OURS, TEXT, Antefix
from tests.bench.drive import engine_of
from tests.bench.results import Kept
from tests.bench.sections import SECTIONS
from tests.bench.shapes import BART_BASE, GPT2_SMALL, LLAMA_19M, parameters
from tests.bench.workload import W, Workload, payloads, stack_prefixes

pytestmark = pytest.mark.filterwarnings("ignore")

TINY_GPT2 = GPT2_SMALL.changed(n_embd=96, n_layer=3, n_head=6, vocab_size=500)
TINY_LLAMA = LLAMA_19M.changed(
    hidden_size=96, num_hidden_layers=2, intermediate_size=128, vocab_size=500, max_position_embeddings=1024
)
TINY_BART = BART_BASE.changed(
    d_model=96, encoder_layers=3, decoder_layers=3, encoder_attention_heads=6, decoder_attention_heads=6,
    encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=500, init_std=0.1,
)  # fmt: skip
FEW = Workload(requests=6, prefixes=3, virtual_tokens=5, prompt_tokens=(4, 12), new_tokens=8)
FEW_ALIKE = replace(FEW, requests=24, prefixes=1)
NOTHING_KEPT = Kept("test")


def sound(section: str, measured: dict[str, Any]) -> dict[str, Any]:
    """What is true of every section's result; returns it."""
    assert SECTIONS[section].table(measured).count("|") > 6
    for name, goal in measured["goals"].items():
        assert math.isfinite(goal["measured"]), name
    return measured


def test_shapes_have_the_parameters_they_are_named_after():
    assert 120e6 < parameters(GPT2_SMALL.changed(n_layer=1).model("eager")) + 11 * 7_087_872 < 130e6
    assert 18e6 < parameters(LLAMA_19M.model("eager")) < 20e6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_throughput(dtype):
    size = throughput.Size(
        shapes=(TINY_LLAMA,),
        dtypes=(dtype,),
        workload=FEW,
        rounds=2,
        padded_rounds=(0,),
        continuous=3,
        bare_rounds=(0, 1),
        text_in=((TINY_LLAMA, torch.float32),),
        text_tokens=40,
        best_of=1,
        slots=2048,
    )
    measured = sound("throughput", throughput.measure(NOTHING_KEPT, size))
    (found,) = measured["models"].values()
    ran = {OURS, BARE, peers.SWITCHED, peers.GROUPED, peers.PADDED}
    ran |= {TEXT, CACHED} if dtype is torch.float32 else set()
    assert ran <= found["median"].keys()
    assert {peers.CONTINUOUS} == ({*found["median"], *found["left_out"]} & {peers.CONTINUOUS})
    assert set(found["ratios"]) >= ran - {OURS}
    assert found["limit"]["tokens_per_second"] > 0
    if dtype is torch.float32:
        assert found["checked"][peers.SWITCHED]["requests"] == size.switched
        assert found["checked"][peers.GROUPED]["requests"] == 4
        assert found["checked"][CACHED]["with the text's tokens"] == 3
    else:
        assert found["checked"]["logits, of the largest"] < found["checked"]["with a neighbour's prefix"]


@pytest.mark.slow
def test_tokens_of_another_request_do_not_pass_for_the_same():
    items = FEW.items(TINY_GPT2.vocabulary)
    peft = peers.peft_model(TINY_GPT2, torch.float32, FEW)
    switched, grouped = peers.PeftSwitched(peft, FEW), peers.PeftGrouped(peft, FEW)
    expected = switched.run(items)
    assert agreement.same_tokens(grouped.run(items), expected, items, switched.next_logits) == 0
    frozen = TINY_GPT2.frozen()
    ours = Antefix(OURS, engine_of(frozen, slots=2048), FEW, payloads(FEW, frozen.geometry))
    assert agreement.same_tokens(ours.run(items), expected, items, switched.next_logits) == 0
    with pytest.raises(AssertionError, match="no tie"):
        agreement.same_tokens([expected[1], expected[0], *expected[2:]], expected, items, switched.next_logits)


def test_the_limit_counts_every_slot_that_decoding_must_read():
    two = Workload(requests=2, prefixes=1, virtual_tokens=10, prompt_tokens=(3, 3), new_tokens=3)
    # the steps after the first token read 4 and 5 own slots a row, and the prefix once for both
    assert machine.slots_read(two, two.items(50)) == 2 * (4 + 5) + 2 * 10


@pytest.mark.slow
def test_encoder_decoder():
    size = encoder_decoder.Size(shape=TINY_BART, workload=FEW, rounds=2, switched=4, best_of=1, slots=4096)
    measured = sound("encoder_decoder", encoder_decoder.measure(NOTHING_KEPT, size))
    assert set(measured["median"]) == set(encoder_decoder.ORDER)
    assert set(measured["ratios"]) == set(encoder_decoder.ORDER) - {OURS}
    requests = {name: found["requests"] for name, found in measured["checked"].items()}
    assert requests == {peers.SWITCHED: 4, encoder_decoder_peers.CONCATENATED: 4, peers.PADDED: 6}
    assert measured["limit"]["tokens_per_second"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("stack", Stack)
def test_tokens_behind_another_stacks_prefix_do_not_pass_for_the_same(stack):
    items, plain = FEW.items(TINY_BART.vocabulary), TINY_BART.model("sdpa")
    prefixes = stack_prefixes(FEW, measure(plain))
    right = encoder_decoder_peers.Concatenated(plain, FEW, prefixes)
    others = [{**own, stack: prefixes[index - 1][stack]} for index, own in enumerate(prefixes)]
    wrong = encoder_decoder_peers.Concatenated(plain, FEW, others)
    expected = right.run(items)
    assert agreement.same_tokens(right.run(items), expected, items, right.next_logits) == 0
    with pytest.raises(AssertionError, match="no tie"):
        agreement.same_tokens(wrong.run(items), expected, items, right.next_logits)


def test_flat():
    size = flat.Size(
        stored=(1, 4, 40), resident=4, on_device=10, rows=8, requests=64, rounds=1, workload=replace(FEW, requests=64)
    )
    measured = sound("flat", flat.measure(NOTHING_KEPT, size))
    assert list(measured["levels"]) == ["1", "4", "40"]
    (many,) = measured["runs"]["40"]
    assert many["loads"] > 4
    assert many["cold_first_token_ms"]["requests"] > 0


def test_draws_follow_zipfs_law():
    drawn = flat.zipf(1000, 20_000, seed=0)
    assert set(drawn) <= set(range(1000))
    assert 1.7 < drawn.count(0) / drawn.count(1) < 2.3


def test_long():
    size = long.Size(shape=TINY_LLAMA, rows=12, virtual_tokens=48, own=8, steps=3, best_of=1)
    measured = sound("long", long.measure(NOTHING_KEPT, size))
    steps = measured["steps"]
    assert steps[long.SHARED]["prefix_slots"] == 48
    assert steps[long.COPIED]["prefix_slots"] == steps[long.VIEWS]["prefix_slots"] == 12 * 48


def test_fair():
    size = fair.Size(rows=8, step_tokens=64, prompts=(16, 100), after=(5,), control=(5,), workload=FEW_ALIKE)
    measured = sound("fair", fair.measure(NOTHING_KEPT, size))
    worst = measured["goals"]["steps of delay beyond its own, at most"]["measured"]
    assert worst < measured["first_come_first_served_steps"]


def test_latency():
    size = latency.Size(
        shape=TINY_LLAMA,
        rows=4,
        slots=4096,
        workload=FEW,
        saturating=24,
        seconds=0.5,
        most=40,
        warm=2,
        unloaded=3,
        long_prompt=600,
        long_share=0.25,
        rounds=2,
    )
    measured = sound("latency", latency.measure(NOTHING_KEPT, size))
    assert measured["scenarios"][latency.LONG]["long_prompts"] > 0
    for found in measured["scenarios"].values():
        assert found["first_token_ms"]["p50"] <= found["first_token_ms"]["p99"]
        assert len(found["gap_curve_ms"]) == len(latency.QUANTILES)
        assert len(found["ratios"]) == 2


def test_growth():
    size = growth.Size(
        shape=TINY_LLAMA, rows=(1, 4), prompts=(4, 40), prefixes=(4, 40), usual=(4, 6, 5), steps=2, read_bytes=1 << 20,
        slots=2048,
    )  # fmt: skip
    measured = sound("growth", growth.measure(NOTHING_KEPT, size))
    assert all(len(curve["ms"]) == 2 for curve in measured["curves"].values())
    assert len(measured["meaning"]) == 3


def test_a_line_is_fitted_in_milliseconds_and_microseconds():
    assert growth.fit([1, 2, 4], [0.011, 0.012, 0.014]) == {"zero_ms": 10.0, "slope_us": 1000.0}


@pytest.mark.parametrize("name", ["latency", "growth"])
def test_curves_become_a_picture(name, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    curve = {"at": [1, 2], "ms": [1.0, 2.0], "zero_ms": 0.0, "slope_us": 1000.0}
    quantiles = [float(i + 1) for i in range(len(latency.QUANTILES))]
    scenario = {"first_token_curve_ms": quantiles, "gap_curve_ms": quantiles}
    SECTIONS[name].plot({"curves": {"rows": curve}, "scenarios": {"50 % load": scenario}})
    assert (tmp_path / f"{name}.svg").read_text().count("<path") > 2


@pytest.mark.slow
def test_http():
    size = http.Size(shape=TINY_LLAMA, workload=replace(FEW, new_tokens=6), rounds=1, slots=2048)
    measured = sound("http", http.measure(NOTHING_KEPT, size))
    (found,) = measured["rounds"]
    assert 6 <= found["events"] <= 36
    assert found["streams_with_the_offline_text"] >= 5


@pytest.mark.slow
def test_training():
    size = training.Size(
        shape=TINY_GPT2, virtual_tokens=4, rows=3, tokens=12, users=3, shortest=4, short=8, rounds=2, together_rounds=2
    )
    measured = sound("training", training.measure(NOTHING_KEPT, size))
    assert set(measured["jobs"][training.ONE]["ratios"]) == {training.PEFT, training.HALF, training.FULL}
    for found in measured["jobs"].values():
        assert found["largest_difference_of_losses"][training.PEFT] < found["with_another_prefix"]
    state = {name: found["state_bytes"] for name, found in measured["memory"].items()}
    assert state[training.OURS] == state[training.PEFT] < state[training.FULL]


def test_w_is_what_it_is_said_to_be():
    assert Workload() == W
