"""The store's server is killed and started again while requests come in; the process that serves them goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from server.api import recent
from tests.redis_server import PROGRAMS, RedisServer, program, running
from tests.server import artefacts
from tests.server.conftest import Serve

LENGTH = 4
Headers = dict[str, str]


@pytest.fixture(params=PROGRAMS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    if program(request.param) is None:
        pytest.skip(f"no package brings a {request.param} server for this machine")
    with running(request.param, tmp_path) as started:
        yield started


@pytest.fixture
def store(server: RedisServer) -> Iterator[Store]:
    opened = Store.open(server.url)
    yield opened
    opened.close()


@dataclass
class Tenant:
    """One that asks over HTTP."""

    client: TestClient
    headers: Headers

    def status(self, method: str, path: str, **body: object) -> tuple[int, str | None]:
        reply = self.client.request(method, path, headers=self.headers, **body)
        return reply.status_code, reply.json().get("error", {}).get("code")

    def generate(self, prefix: str | None = None) -> tuple[int, object]:
        """The status, and which version answered or what was wrong."""
        reply = self.client.post("/generate", json={"prompt": "x", "prefix_id": prefix}, headers=self.headers)
        answer = reply.json()
        if reply.status_code != 200:
            return reply.status_code, answer["error"]["code"]
        return 200, answer["prefix"] and answer["prefix"]["version"]

    def upload(self, name: str, file: bytes) -> tuple[int, str | None]:
        return self.status("POST", "/v1/prefixes", data={"id": name}, files={"file": ("f", file)})


def tenant(client: TestClient, store: Store, name: str, *scopes: str, lifetime: float | None = None) -> Tenant:
    presented, _ = store.keys.create(name, scopes or ("admin",), lifetime)
    return Tenant(client, {"authorization": f"Bearer {presented}"})


@pytest.fixture
def acme(client: TestClient, store: Store) -> Tenant:
    return tenant(client, store, "acme")


def away(answer: tuple[int, object]) -> bool:
    return answer == (503, "store_unavailable")


def test_what_is_resident_answers_and_writes_fail_clearly_until_the_store_is_back(
    client: TestClient, store: Store, server: RedisServer, acme: Tenant, frozen: FrozenModel
) -> None:
    files = [artefacts.native(frozen, LENGTH, seed) for seed in range(2)]
    for name in ("support", "gone", "cold"):
        assert acme.upload(name, files[0]) == (201, None)
    other, reader = tenant(client, store, "other"), tenant(client, store, "acme", "prefix:read")
    unseen, expired = tenant(client, store, "acme"), tenant(client, store, "acme", "generate", lifetime=1.0)
    assert acme.generate("support") == acme.generate("support@1") == acme.generate("gone") == (200, 1)
    assert acme.generate("cold@7") == (404, "prefix_not_found")
    assert other.generate() == expired.generate() == (200, None)
    assert reader.status("GET", "/v1/prefixes/support") == (200, None)
    assert acme.status("DELETE", "/v1/prefixes/gone") == (200, None)

    server.stop()
    time.sleep(1.1)  # the key ends
    for _ in range(3):
        assert acme.generate("support") == acme.generate("support@1") == (200, 1)
        assert acme.generate() == (200, None)
    for never_asked in ("gone", "cold", "cold@7", "support@2", "nothing"):
        assert away(acme.generate(never_asked))
    for foreign in ("support", "acme/support", "acme/support@1"):
        assert other.generate(foreign)[0] in (404, 503)
    assert reader.generate("support") == (403, "insufficient_scope")
    assert away(unseen.generate("support"))
    assert away(expired.generate())
    assert away(acme.upload("support", files[1]))
    for method, path in [
        ("DELETE", "/v1/prefixes/support"),
        ("GET", "/v1/prefixes"),
        ("GET", "/v1/prefixes/support"),
        ("GET", "/v1/jobs"),
    ]:
        assert away(acme.status(method, path))
    assert away(acme.status("POST", "/v1/prefixes/x/train", json={"examples": [{"prompt": "a", "completion": "b"}]}))
    reply = client.get("/readyz")
    assert (reply.status_code, reply.json()) == (200, {"status": "degraded", "model": True, "store": False})
    assert client.get("/readyz", params={"store": "1"}).status_code == 503
    scraped = client.get("/metrics", headers=acme.headers).text
    assert 'antefix_answers_from_memory_total{what="prefix"}' in scraped

    server.start()
    assert acme.upload("support", files[1]) == (201, None)
    assert acme.generate("support") == (200, 2)
    assert client.get("/readyz", params={"store": "1"}).json() == {"status": "ready", "model": True, "store": True}
    time.sleep(recent.PAUSE_SECONDS)
    assert acme.generate("gone") == (404, "prefix_not_found")
    assert acme.generate("cold") == (200, 1)
    assert other.generate("support") == (404, "prefix_not_found")
    assert unseen.generate("support") == (200, 2)
    assert expired.generate() == (401, "invalid_api_key")


def test_an_open_server_stays_open_for_what_changes_nothing(
    client: TestClient, server: RedisServer, frozen: FrozenModel
) -> None:
    anyone = Tenant(client, {})
    assert anyone.upload("support", artefacts.native(frozen, LENGTH)) == (201, None)
    assert anyone.generate("support") == (200, 1)
    server.stop()
    assert anyone.generate("support") == (200, 1)
    assert away(anyone.upload("support", artefacts.native(frozen, LENGTH)))
    server.start()
    assert anyone.upload("support", artefacts.native(frozen, LENGTH)) == (201, None)


def test_a_key_that_was_taken_away_is_not_remembered(
    client: TestClient, store: Store, server: RedisServer, acme: Tenant
) -> None:
    leaving = tenant(client, store, "acme")
    assert leaving.generate() == acme.generate() == (200, None)
    for key in store.keys.all():
        if key.id in leaving.headers["authorization"]:
            store.keys.remove(key.id)
    assert leaving.generate() == (401, "invalid_api_key")
    server.stop()
    assert away(leaving.generate())
    assert acme.generate() == (200, None)


def test_what_was_known_is_not_known_for_ever(
    serve: Serve, store: Store, server: RedisServer, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent, "GOOD_SECONDS", 0.0)
    anyone = Tenant(serve(), {})
    assert anyone.upload("support", artefacts.native(frozen, LENGTH)) == (201, None)
    assert anyone.generate("support") == (200, 1)
    server.stop()
    assert away(anyone.generate("support"))


@pytest.mark.parametrize("server", ["redis"], indirect=True)  # a process that is stopped is the same everywhere
def test_while_the_store_hangs_what_is_known_is_answered_at_once_and_the_rest_refused(
    serve: Serve, store: Store, server: RedisServer, frozen: FrozenModel
) -> None:
    """In one event loop, as a real server has it; here all of its threads could be taken by those that wait."""
    with serve(counters_url=server.url) as client:
        acme, scraper = tenant(client, store, "acme"), tenant(client, store, "acme", "metrics")
        store.tenants.set_quotas("acme", {"requests_per_minute": 10_000})
        assert acme.upload("support", artefacts.native(frozen, LENGTH)) == (201, None)
        assert acme.generate("support") == (200, 1)
        assert client.get("/metrics", headers=scraper.headers).status_code == 200
        strangers = [Tenant(client, {"x-api-key": f"afx_{number:08}_{'b' * 43}"}) for number in range(120)]

        server.hang()
        try:
            with ThreadPoolExecutor(len(strangers)) as pool:
                begun = time.monotonic()
                waiting = [pool.submit(stranger.generate) for stranger in strangers]
                assert acme.generate("support") == (200, 1)
                assert time.monotonic() - begun < 2 * recent.PATIENCE_SECONDS, "the first finds out"
                assert {each.result() for each in waiting} == {(503, "store_unavailable")}
                begun = time.monotonic()
                writing = [pool.submit(stranger.upload, "x", b"x") for stranger in strangers]
                for _ in range(5):
                    assert acme.generate("support") == (200, 1)
                assert time.monotonic() - begun < recent.PATIENCE_SECONDS
                begun = time.monotonic()
                scraped = client.get("/metrics", headers=scraper.headers)
                assert time.monotonic() - begun < 5, "Prometheus waits ten seconds"
                assert (scraped.status_code, "\nantefix_store_up 0.0\n" in scraped.text) == (200, True)
                assert "antefix_num_requests_running" in scraped.text
                assert client.get("/readyz").json()["status"] == "degraded"
                assert {each.result() for each in writing} == {(503, "store_unavailable")}
                # those of a known key wait for the store itself, in threads that nobody else needs
                listing = [pool.submit(acme.status, "GET", "/v1/prefixes") for _ in range(60)]
                time.sleep(0.5)
                begun = time.monotonic()
                assert acme.generate("support") == (200, 1)
                assert client.get("/metrics", headers=scraper.headers).status_code == 200
                assert client.get("/readyz").json()["status"] == "degraded"
                assert time.monotonic() - begun < 5
                server.go_on()
                assert {each.result() for each in listing} == {(200, None)}
        finally:
            server.go_on()
        time.sleep(recent.PAUSE_SECONDS)
        acme.generate("support")
        time.sleep(0.5)
        assert acme.upload("support", artefacts.native(frozen, LENGTH, 1)) == (201, None)
        assert acme.generate("support") == (200, 2)
        assert "\nantefix_store_up 1.0\n" in client.get("/metrics", headers=scraper.headers).text
        assert client.portal is not None
        client.portal.call(client.app.state.services.rates._storage.bridge.storage.aclose)  # type: ignore[attr-defined]
