"""Verification passes on a sound server, and not on one that mixes rows up in any of the ways there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from prefix_store import codec
from prefix_store.store import Store
from server.api import aside
from server.engine import batch, int8_linear
from server.engine import engine as engine_module
from server.scheduler.plan import Load
from tests.models import random_kv, tiny_frozen
from tests.parity.harness import a_few
from tests.server import artefacts
from tests.server.live import LIMITS, Live, serving

MIXED_UP = 4  # rows from which on a step is a mixed one


@pytest.fixture(autouse=True)
def in_no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside another test on the same core its low priority would make this ten times as long."""
    monkeypatch.setattr(aside, "LOW_PRIORITY", 0)


@pytest.fixture
def live(store: Store) -> Iterator[Live]:
    with serving(store) as running:
        publish(running)
        yield running


def publish(running: Live, family: str = "llama") -> None:
    """A prefix of each method, and one that does not fit."""
    model = tiny_frozen(family)
    running.publish("kv", artefacts.native(model, 5, seed=1))
    running.publish("kv-long", artefacts.native(model, 20, seed=2))
    running.publish("soft", artefacts.prompt(model, 4))
    running.publish("plus", artefacts.memory(model))


def verify(live: Live, name: str = "kv") -> dict[str, Any]:
    reply = live.client.post(f"/v1/prefixes/{name}/verify")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def failed(found: dict[str, Any]) -> set[str]:
    assert not found["ok"]
    return {part["name"] for part in found["checks"] if not part["ok"]}


@pytest.mark.parametrize("name", ["kv", "soft", "plus"])
def test_a_sound_server_passes(live, name):
    found = verify(live, name)
    assert found["ok"]
    assert found["prefix"]["id"] == name
    assert [check["tokens_differ"] for check in found["checks"]] == [0, 0, 0]
    assert all(check["max_logprob_difference"] < 1e-4 for check in found["checks"])
    assert all(control["mean_logprob_difference"] > 0.1 for control in found["controls"])
    assert found["rows_beside"] >= 8
    assert found["neighbours"] == [f"{other}@1" for other in ("kv", "kv-long", "plus", "soft") if other != name]
    assert found["tokens"] == 4 * 12
    assert (found["reference"] == "transformers") == (name != "plus")
    assert found["computed_with"] == "the float32 weights as they were loaded"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_fewer_bits_pass_with_their_own_tolerance(store, dtype):
    if dtype is torch.int8 and not int8_linear.works():
        pytest.skip("no exact int8 product on this machine")
    with serving(store, dtype=dtype) as live:
        publish(live)
        found = verify(live)
    assert found["ok"], found
    assert ("int8" in found["computed_with"]) == (dtype is torch.int8)


@pytest.mark.parametrize("window", ["slides", "always"])
@pytest.mark.slow
@pytest.mark.parametrize("family", a_few(["gpt2", "gemma2", "gpt_neox", "mistral", "opt", "phi3", "qwen3"]))
def test_families_pass(store, family, window):
    with serving(store, family) as live:
        publish(live, family)
        live.publish("window", artefacts.native(tiny_frozen(family), 5, seed=3, window=window))
        found = verify(live, "window")
        assert found["ok"], found
        assert (found["reference"] == "transformers") == (window == "slides" or not live.frozen.has_sliding_window)
        assert verify(live, "soft")["ok"]


def test_swapped_prefixes_fail(live, monkeypatch):
    apply, other = live.engine.pool.apply, random_kv(live.frozen, 5, seed=4)
    live.publish("a-look-alike", artefacts.native(tiny_frozen("llama"), 5, seed=4))

    def swapped(transfer: Any) -> None:
        if isinstance(transfer, Load) and transfer.payload.virtual_tokens == 5:
            transfer = replace(transfer, payload=replace(transfer.payload, tensor=other))
        apply(transfer)

    monkeypatch.setattr(live.engine.pool, "apply", swapped)
    found = verify(live)
    assert failed(found) == {"in a mixed batch, as plain transformers", "alone, as plain transformers"}
    named = {control["name"]: control for control in found["controls"]}
    assert named["with a-look-alike@1 instead"]["mean_logprob_difference"] < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lost_position_offset_fails(store, monkeypatch, dtype):
    pack = batch._pack

    def shifted(row: Any, positions: list[int], slots: list[int]) -> None:
        before = len(positions)
        pack(row, positions, slots)
        positions[before:] = range(row.start, row.start + row.count)

    with serving(store, "gpt2", dtype) as live:
        publish(live, "gpt2")
        monkeypatch.setattr(batch, "_pack", shifted)
        assert not verify(live)["ok"]


def test_rows_that_get_their_neighbours_logits_fail_in_the_mixed_batch_alone(live, monkeypatch):
    sample = engine_module.sample

    def leaking(logits: torch.Tensor, selections: Any) -> Any:
        return sample(logits.roll(1, 0) if len(selections) > MIXED_UP else logits, selections)

    monkeypatch.setattr(engine_module, "sample", leaking)
    found = failed(verify(live))
    assert found == {"in a mixed batch, as plain transformers", "in a mixed batch, as alone"}


def test_a_little_of_a_neighbour_fails_where_no_token_differs(live, monkeypatch):
    """A hundredth of another row's logits changes no token; the log-probabilities tell."""
    sample = engine_module.sample

    def leaking(logits: torch.Tensor, selections: Any) -> Any:
        return sample(logits + 0.01 * logits.roll(1, 0) if len(selections) > MIXED_UP else logits, selections)

    monkeypatch.setattr(engine_module, "sample", leaking)
    assert "in a mixed batch, as plain transformers" in failed(verify(live))


def test_a_server_without_room_for_a_neighbour_shows_nothing(store):
    with serving(store, limits=replace(LIMITS, rows=1)) as live:
        live.publish("kv", artefacts.native(tiny_frozen("llama"), 5))
        found = verify(live)
    assert (found["ok"], found["rows_beside"]) == (False, 0)


def test_a_prefix_that_changes_nothing_cannot_be_verified(live, tmp_path):
    file = tmp_path / "memory"
    file.write_bytes(artefacts.memory(tiny_frozen("llama")))
    manifest, tensors = codec.decode(file)
    live.publish("nothing", codec.encode(manifest, {"memory": torch.zeros_like(tensors["memory"])}))
    found = verify(live, "nothing")
    assert all(check["ok"] for check in found["checks"])
    assert [control["ok"] for control in found["controls"]] == [False, True]
    assert not found["ok"]


def test_a_prefix_that_fills_the_context_is_verified_with_what_room_there_is(store):
    with serving(store) as live:
        model = tiny_frozen("llama")
        live.publish("whole", artefacts.native(model, 508))
        found = verify(live, "whole")
        assert found["ok"], found
        assert found["tokens"] == 4 * 3


def test_what_is_not_there_is_404(client: TestClient) -> None:
    reply = client.post("/v1/prefixes/nobody/verify")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "prefix_not_found")
