import math
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from httpx import Response
from starlette.testclient import TestClient

from prefix_store.errors import QuotaExceeded, RateLimited, StoreUnavailable
from prefix_store.store import Store
from prefix_store.tenants import Quotas
from server.api.rates import QUOTAS_SECONDS, Rates, counters, wait
from tests import redis_server
from tests.prefix_store.samples import Clock
from tests.server.conftest import Serve
from tests.server.fakes import FakeLoop


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time by which the minutes in this process are counted."""
    made = Clock(60.0 * 1000)
    monkeypatch.setattr("limits.aio.storage.memory.time", SimpleNamespace(time=made))
    return made


def always(**quotas: int) -> Callable[[str], Awaitable[Quotas]]:
    async def read(tenant: str) -> Quotas:
        return Quotas(**quotas)

    return read


def rates(clock: Clock, **quotas: int) -> Rates:
    return Rates(always(**quotas), counters(None), clock)


async def admitted(of: Rates, tenant: str = "acme", tries: int = 20) -> int:
    """How many requests are let in before one is refused."""
    for count in range(tries):
        try:
            await of.count_request(tenant)
        except RateLimited:
            return count
    return tries


@pytest.mark.anyio
async def test_requests_of_a_minute_are_bounded_for_each_tenant(clock: Clock) -> None:
    made = rates(clock, requests_per_minute=5)
    assert await admitted(made) == 5
    assert await admitted(made, "other") == 5
    assert await admitted(rates(clock), tries=50) == 50


@pytest.mark.anyio
async def test_no_minute_wherever_it_begins_has_many_more_than_its_bound(clock: Clock) -> None:
    """The window slides: a flood at the end of one minute and at the beginning of the next is no way round it."""
    most, rng, times = 30, random.Random(3), []
    made = rates(clock, requests_per_minute=most)
    for _ in range(3000):
        clock.now += rng.choice([0.01, 0.3, 4.0])
        try:
            await made.count_request("acme")
            times.append(clock.now)
        except RateLimited:
            pass
    worst = max(sum(start <= at < start + 60 for at in times) for start in times)
    assert most <= worst <= 1.5 * most  # an estimate that supposes an even flow; a fixed window would let 2 × in


@pytest.mark.anyio
async def test_whoever_waits_as_long_as_it_is_told_is_let_in_and_not_long_before(clock: Clock) -> None:
    rng = random.Random(4)
    for _ in range(100):
        made = rates(clock, requests_per_minute=rng.randrange(1, 20))
        for _ in range(rng.randrange(1, 60)):
            clock.now += rng.random() * 6
            try:
                await made.count_request("acme")
            except RateLimited as error:
                told, refused_at = error.retry_after, clock.now
                assert 1 <= told <= 120
                clock.now = refused_at + told
                await made.count_request("acme")


@pytest.mark.parametrize(
    ("window", "seconds"),
    [
        ((10, 0, 0.0, 0, 0.0), 0.0),
        ((10, 0, 0.0, 9, 70.0), 0.0),
        ((10, 0, 0.0, 10, 100.0), 40.0),  # in 40 s they begin to lose weight
        ((10, 10, 30.0, 5, 90.0), 0.0 + 0.0),  # the older half of ten counts 5, so 10 of 10: at once less
        ((10, 20, 30.0, 5, 90.0), 15.0),
        ((0, 0, 0.0, 0, 0.0), 60.0),
    ],
)
def test_how_long_until_there_is_room(window: tuple[int, int, float, int, float], seconds: float) -> None:
    assert wait(*window) == pytest.approx(seconds, abs=0.01)


@pytest.mark.anyio
async def test_tokens_are_let_in_while_there_is_room_and_counted_as_they_were_used(clock: Clock) -> None:
    made = rates(clock, tokens_per_minute=100)
    await made.start("acme", 1, 99)
    await made.start("acme", 1, 50)  # there was room for one
    with pytest.raises(RateLimited, match="may use 100 tokens a minute"):
        await made.start("acme", 1, 1)
    await made.start("other", 1, 99)
    await made.count_generated("other", 1)
    with pytest.raises(RateLimited):
        await made.start("other", 1, 1)
    clock.now += 121
    await made.start("acme", 1, 1)


@pytest.mark.anyio
async def test_sequences_that_run_are_counted_until_they_end(clock: Clock) -> None:
    made = rates(clock, concurrent_sequences=4)
    await made.start("acme", 3, 1)
    with pytest.raises(RateLimited, match="4 sequences at a time; 3 run now"):
        await made.start("acme", 2, 1)
    await made.start("other", 4, 1)
    made.end("acme", 3)
    await made.start("acme", 4, 1)


@pytest.mark.anyio
async def test_quotas_are_read_now_and_then_and_remembered_while_the_store_is_away(clock: Clock) -> None:
    answers: list[Any] = [Quotas(concurrent_sequences=0), StoreUnavailable("gone"), Quotas()]

    async def quotas(tenant: str) -> Quotas:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    made = Rates(quotas, counters(None), clock)
    for _ in range(3):
        with pytest.raises(QuotaExceeded):
            await made.start("acme", 1, 1)
    assert len(answers) == 2
    clock.now += QUOTAS_SECONDS
    with pytest.raises(QuotaExceeded):
        await made.start("acme", 1, 1)
    clock.now += QUOTAS_SECONDS
    await made.start("acme", 1, 1)


# in a server


def quota(store: Store, **quotas: int) -> None:
    store.tenants.create("default")
    store.tenants.set_quotas("default", dict(quotas))


def refused(client: TestClient, **body: Any) -> tuple[int, str]:
    reply = client.post("/generate", json={"prompt": "x", **body})
    return reply.status_code, reply.json().get("error", {}).get("code")


def test_one_request_too_many_is_429_and_says_when(client: TestClient, store: Store, clock: Clock) -> None:
    quota(store, requests_per_minute=2)
    assert [client.get("/v1/jobs").status_code for _ in range(2)] == [200, 200]
    reply = client.get("/v1/prefixes")
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert reply.json()["error"]["type"] == "rate_limit_error"
    assert reply.headers["retry-after"] == "61"  # the minute to its end: then both begin to lose weight
    assert client.get("/healthz").status_code == 200


def test_tokens_are_the_prompt_s_and_the_answer_s(serve: Serve, store: Store, clock: Clock) -> None:
    used = serve().post("/generate", json={"prompt": "xyz", "max_tokens": 4}).json()["usage"]
    quota(store, tokens_per_minute=2 * (used["prompt_tokens"] + used["completion_tokens"]))
    client = serve()  # one that has not asked for quotas yet
    for status in (200, 200, 429):
        assert client.post("/generate", json={"prompt": "xyz", "max_tokens": 4}).status_code == status


def test_a_stream_s_tokens_count_too(client: TestClient, store: Store, clock: Clock) -> None:
    quota(store, tokens_per_minute=5)
    assert client.post("/generate", json={"prompt": [2], "max_tokens": 4, "stream": True}).status_code == 200
    assert refused(client) == (429, "rate_limit_exceeded")


def test_choices_run_beside_one_another(client: TestClient, store: Store, loop: FakeLoop) -> None:
    quota(store, concurrent_sequences=3)
    assert refused(client, n=4) == (403, "quota_exceeded")  # waiting would not help
    assert refused(client, n=3) == (200, None)
    loop.hold.clear()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/generate", json={"prompt": "x", "n": 2})
        while len(loop.requests) < 5:
            threading.Event().wait(0.01)
        assert refused(client, n=2) == (429, "rate_limit_exceeded")
        loop.hold.set()
        assert running.result().status_code == 200
    assert refused(client, n=3) == (200, None)
    assert refused(client, num_beams=3) == (200, None)
    assert refused(client, num_beams=4) == (403, "quota_exceeded")


def test_what_the_engine_refuses_does_not_run(client: TestClient, store: Store, loop: FakeLoop) -> None:
    quota(store, concurrent_sequences=1)
    loop.refusal = RuntimeError("full")
    assert refused(client)[0] == 500
    loop.refusal = None
    assert refused(client) == (200, None)


# shared by several servers


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis_server.RedisServer]:
    if redis_server.program("redis") is None:
        pytest.skip("no redis-server for this machine")
    with redis_server.running("redis", Path(tmp_path_factory.mktemp("r"))) as server:
        yield server


@pytest.mark.anyio
async def test_servers_of_one_redis_share_the_count(redis: redis_server.RedisServer) -> None:
    servers = [
        Rates(always(requests_per_minute=6, tokens_per_minute=10), counters(redis.url), Clock()) for _ in range(2)
    ]
    assert [await admitted(server, tries=4) for server in servers] == [4, 2]
    with pytest.raises(RateLimited) as caught:
        await servers[0].count_request("acme")
    assert 55 <= caught.value.retry_after <= 75
    await servers[0].start("acme", 1, 50)
    with pytest.raises(RateLimited):
        await servers[1].start("acme", 1, 1)
    await close(servers)


@pytest.mark.anyio
async def test_where_the_count_cannot_be_reached_nobody_is_refused(tmp_path: Path) -> None:
    made = Rates(always(requests_per_minute=1), counters(f"unix://{tmp_path}/none"), Clock())
    assert await admitted(made, tries=3) == 3
    assert math.isfinite(await made._wait("requests", "acme", 1))
    await close([made])


@pytest.mark.anyio
async def test_counters_that_are_known_to_be_away_are_not_asked(clock: Clock) -> None:
    made = Rates(always(requests_per_minute=1, tokens_per_minute=1), None, clock, lambda: True)  # type: ignore[arg-type]
    assert await admitted(made, tries=3) == 3
    await made.start("acme", 1, 5)
    await made.count_generated("acme", 5)
    assert await made.headers("acme") == {}


async def close(servers: list[Rates]) -> None:
    for server in servers:
        await server._storage.bridge.storage.aclose()


# what a reply says is left


def left(reply: Response, what: str) -> tuple[int, int, str]:
    limit, remaining, reset = (reply.headers[f"x-ratelimit-{name}-{what}"] for name in ("limit", "remaining", "reset"))
    return int(limit), int(remaining), reset


def test_replies_say_what_is_left_under_openai_s_names(client: TestClient, store: Store, clock: Clock) -> None:
    quota(store, requests_per_minute=3, tokens_per_minute=100)
    reply = client.get("/v1/jobs")
    assert left(reply, "requests") == (3, 2, "120s")
    assert left(reply, "tokens") == (100, 100, "0s")
    reply = client.post("/generate", json={"prompt": [2, 3, 4], "max_tokens": 2})
    assert left(reply, "requests") == (3, 1, "120s")
    assert left(reply, "tokens") == (100, 95, "120s")
    clock.now += 30
    stream = client.post("/generate", json={"prompt": [2], "max_tokens": 2, "stream": True})
    assert left(stream, "tokens") == (100, 94, "90s")  # what it will generate is not known yet
    refused = client.get("/v1/prefixes/none")
    assert refused.status_code == 429
    assert left(refused, "requests") == (3, 0, "90s")
    assert left(refused, "tokens") == (100, 92, "90s")


def test_without_a_quota_they_say_nothing_of_it(client: TestClient, store: Store, clock: Clock) -> None:
    quota(store, tokens_per_minute=100)
    headers = client.get("/v1/jobs").headers
    assert {name for name in headers if name.startswith("x-ratelimit")} == {
        f"x-ratelimit-{name}-tokens" for name in ("limit", "remaining", "reset")
    }
    assert not [name for name in client.get("/healthz").headers if name.startswith("x-ratelimit")]


@pytest.mark.anyio
async def test_what_is_left_and_when_all_of_it_is_there_again_are_true(clock: Clock) -> None:
    """Against the clock: as many more as were said to be left are let in, and no more; after the reset all are."""
    rng = random.Random(5)
    for _ in range(50):
        most = rng.randrange(1, 20)
        made = rates(clock, requests_per_minute=most)
        for _ in range(rng.randrange(60)):
            clock.now += rng.random() * 6
            with suppress(RateLimited):
                await made.count_request("acme")
        said = await made.headers("acme")
        assert int(said["x-ratelimit-remaining-requests"]) <= await admitted(made) <= most
        said = await made.headers("acme")
        assert said["x-ratelimit-remaining-requests"] == "0"
        clock.now += int(said["x-ratelimit-reset-requests"].removesuffix("s"))
        assert await made.headers("acme") == {
            "x-ratelimit-limit-requests": str(most),
            "x-ratelimit-remaining-requests": str(most),
            "x-ratelimit-reset-requests": "0s",
        }
        clock.now += 200


@pytest.mark.anyio
async def test_where_the_count_cannot_be_reached_nothing_is_said(tmp_path: Path) -> None:
    made = Rates(always(requests_per_minute=1), counters(f"unix://{tmp_path}/none"), Clock())
    assert await made.headers("acme") == {}
    await close([made])
