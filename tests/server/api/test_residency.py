"""POST /v1/prefixes/{ref}/preload and /release, on a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from httpx import Response

from prefix_store.store import Store
from tests.models import tiny_frozen
from tests.server import artefacts
from tests.server.live import LIMITS, Live, serving

FROZEN = tiny_frozen("llama")


@pytest.fixture
def live(store: Store) -> Iterator[Live]:
    with serving(store) as running:
        running.publish("a", artefacts.native(FROZEN, 6, seed=1))
        yield running


def ask(live: Live, what: str, ref: str) -> Response:
    return live.client.post(f"/v1/prefixes/{ref}/{what}")


def kept(live: Live) -> set[str]:
    """Digests on the device."""
    return {resident.payload.digest for resident in live.engine.scheduler.residency.residents()}


def digest(live: Live, ref: str) -> str:
    found: str = live.client.get(f"/v1/prefixes/{ref}").json()["digest"]
    return found


def test_it_is_there_when_the_reply_comes_and_gone_after_its_release(live: Live) -> None:
    reply = ask(live, "preload", "a")
    assert reply.status_code == 200, reply.text
    shown = {"id": "a", "object": "prefix.residency", "version": 1, "digest": digest(live, "a"), "preloaded": True}
    assert reply.json() == shown
    assert kept(live) == {digest(live, "a")}
    assert "antefix_prefixes_preloaded 1.0" in live.client.get("/metrics").text
    assert live.client.post("/generate", json={"prompt": "x", "prefix_id": "a", "max_tokens": 2}).status_code == 200
    assert live.engine.scheduler.residency.misses == 0
    for _ in range(2):
        assert ask(live, "release", "a").json() == shown | {"preloaded": False}
        assert kept(live) == set()


def test_a_new_version_is_not_preloaded_and_the_old_one_stays_until_it_is_released(live: Live) -> None:
    ask(live, "preload", "a")
    old = digest(live, "a")
    live.publish("a", artefacts.native(FROZEN, 6, seed=2))
    assert kept(live) == {old}
    ask(live, "release", "a")  # of the current version: not the one that is held
    assert kept(live) == {old}
    assert ask(live, "preload", "a").json()["version"] == 2
    assert kept(live) == {old, digest(live, "a@2")}
    ask(live, "release", "a@1")
    assert kept(live) == {digest(live, "a@2")}


@pytest.mark.parametrize("path", ["/v1/prefixes/a", "/v1/prefixes/a@1", "/v1/models/a"])
def test_deleting_ends_it_at_once(live: Live, path: str) -> None:
    ask(live, "preload", "a")
    assert live.client.delete(path).status_code == 200
    assert kept(live) == set()
    assert live.engine.scheduler.space.preloads.slots == 0
    assert ask(live, "release", "a").json()["error"]["code"] == "prefix_not_found"


def test_what_another_process_deleted_makes_room_for_the_next(live: Live, store: Store, tmp_path: Path) -> None:
    most = live.engine.limits.preloadable
    live.publish("large", artefacts.native(FROZEN, 450, seed=3))
    copies = most // 450
    for seed in range(copies):
        live.publish(f"large{seed}", artefacts.native(FROZEN, 450, seed=10 + seed))
        assert ask(live, "preload", f"large{seed}").status_code == 200
    full = ask(live, "preload", "large")
    assert (full.status_code, full.json()["error"]["code"]) == (409, "conflict")
    assert full.headers["x-should-retry"] == "false"
    assert "release another one first" in full.json()["error"]["message"]
    elsewhere = Store.open(f"sqlite:///{tmp_path}/store.db")
    elsewhere.prefixes.delete(elsewhere.prefixes.page("default", "large", 1)[0].ref)
    elsewhere.close()
    assert ask(live, "preload", "large").status_code == 200


def test_what_could_never_fit_is_refused_and_what_does_leaves_room_for_the_longest_request(store: Store) -> None:
    tight = type(LIMITS)(slots=700, rows=8, step_tokens=64, context_length=512, waiting=100)
    with serving(store, limits=tight) as live:
        most = live.engine.limits.preloadable
        live.publish("large", artefacts.native(FROZEN, most + 1, seed=4))
        live.publish("fits", artefacts.native(FROZEN, most, seed=5))
        reply = ask(live, "preload", "large")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prefix_id")
        assert f"preloaded ones may take {most} in all" in reply.json()["error"]["message"]
        assert ask(live, "preload", "fits").status_code == 200
        body = {"prompt": [70] * 400, "prefix_id": "large", "max_tokens": 512 - 400 - most - 1, "ignore_eos": True}
        assert live.client.post("/generate", json=body).json()["finish_reason"] == "length"
        assert digest(live, "fits") in kept(live)


def test_content_that_two_tenants_hold_stays_until_both_let_go(store: Store) -> None:
    keys = {tenant: store.keys.create(tenant, ["admin"])[0] for tenant in ("acme", "other")}
    file = artefacts.native(FROZEN, 6, seed=1)
    with serving(store) as live:

        def by(tenant: str, what: str, **more: bytes) -> Response:
            method = "PUT" if more else "POST"
            headers = {"authorization": f"Bearer {keys[tenant]}"}
            return live.client.request(method, f"/v1/prefixes/mine/{what}", headers=headers, **more)

        for tenant in keys:
            assert by(tenant, "content", content=file).status_code == 201
            assert by(tenant, "preload").status_code == 200
        assert len(kept(live)) == 1
        by("acme", "release")
        by("acme", "release")
        assert len(kept(live)) == 1
        by("other", "release")
        assert len(kept(live)) == 0


@pytest.mark.parametrize("scope", ["generate", "prefix:write"])
def test_room_on_the_device_is_the_operator_s_to_give(store: Store, scope: str) -> None:
    key = store.keys.create("acme", [scope])[0]
    with serving(store) as live:
        for what in ("preload", "release"):
            reply = live.client.post(f"/v1/prefixes/a/{what}", headers={"authorization": f"Bearer {key}"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "insufficient_scope")


def test_a_prefix_that_is_on_the_device_is_not_read_from_the_disk_again(live: Live) -> None:
    loader = live.client.app.state.services.loader
    loader._budget = 0
    ask(live, "preload", "a")
    first = loader.load(version := live.client.app.state.services.store.prefixes.page("default")[0])
    others = [("b", 2), ("c", 3)]
    for name, seed in others:
        live.publish(name, artefacts.native(FROZEN, 6, seed=seed))
    versions = live.client.app.state.services.store.prefixes.page("default", "a")
    loader.load(versions[0])
    assert loader.load(version) is first
    ask(live, "release", "a")
    loader.load(versions[1])
    assert loader.load(version) is not first
