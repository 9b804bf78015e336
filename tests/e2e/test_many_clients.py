"""Two hundred clients at once, each with the answer that it has alone; tenants of unequal size with equal shares."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from prefix_store.store import Store
from tests.e2e.processes import SERVER, Running

pytestmark = pytest.mark.slow
PREFIXES = ["carroll", "easy", "factbook", "hard", "plays", "speeches", "tables", "wodehouse"]
STARTS = ["The king", "Once upon a time", "x", "In the year 1900, the", "12 + 7 =", "She said: “", "France", "\n\n"]
CLIENTS, TOKENS = 200, 24
# Logits that are nearer to one another than this are a tie, which rounding may decide either way.
TIE = 1e-4
# Of two tenants that ask for all they can get, one ten times as much: each has this share of the tokens at least.
LEAST_SHARE = 0.4
CROWD, FEW, FAIR_SECONDS = 80, 8, 4.0


@dataclass(frozen=True)
class Answer:
    """Its tokens, and for each by how much its logit is above the next best."""

    tokens: list[int]
    gaps: list[float]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running.start(tmp_path_factory.mktemp("many"), *SERVER)
    try:
        yield running
    finally:
        running.close()


def ask(client: httpx.Client, number: int) -> Answer:
    """One of 64 different requests, half of which end the prompt differently."""
    prefix, start = PREFIXES[number % 8], STARTS[number // 8 % 8]
    body = {"model": prefix, "prompt": start, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 2}
    reply = client.post("/v1/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    assert reply.json()["prefix"]["id"] == prefix
    found = reply.json()["choices"][0]["logprobs"]
    best = [sorted(top.values(), reverse=True) for top in found["top_logprobs"]]
    return Answer(found["token_ids"], [values[0] - values[1] for values in best])


def differs(mixed: Answer, alone: Answer) -> bool:
    """Whether they part at a token that is no tie."""
    pairs = zip(mixed.tokens, alone.tokens, alone.gaps, strict=True)
    gap = next((gap for one, other, gap in pairs if one != other), None)
    return gap is not None and gap >= TIE


def test_each_of_200_clients_over_8_prefixes_has_the_answer_that_it_has_alone(server: Running) -> None:
    alone = [ask(server.client, number) for number in range(64)]
    assert len({tuple(answer.tokens) for answer in alone}) > 56
    together = threading.Barrier(CLIENTS)
    limits = httpx.Limits(max_connections=CLIENTS)

    def client(number: int) -> Answer:
        together.wait()
        return ask(many, number % 64)

    with httpx.Client(base_url=server.client.base_url, limits=limits) as many, ThreadPoolExecutor(CLIENTS) as pool:
        mixed = list(pool.map(client, range(CLIENTS)))
    wrong = [number for number, answer in enumerate(mixed) if differs(answer, alone[number % 64])]
    assert wrong == []
    # the control: beside another's answer nearly every one would have differed
    assert sum(differs(answer, alone[(number + 1) % 64]) for number, answer in enumerate(mixed)) > 0.9 * CLIENTS


def test_a_tenant_with_ten_times_the_clients_gets_no_more_than_its_share(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    store = Store.open(url)
    keys = {name: store.keys.create(name, ["admin"])[0] for name in ("crowd", "few")}
    store.close()
    running = Running.start(tmp_path, *SERVER, STORE=url, MAX_BATCH="8")
    served: Counter[str] = Counter()
    stopped = threading.Event()

    def client(tenant: str) -> None:
        headers = {"authorization": f"Bearer {keys[tenant]}"}
        body = {"prompt": "The king", "max_tokens": 32, "ignore_eos": True}
        with httpx.Client(base_url=running.client.base_url, headers=headers, timeout=60) as own:
            while not stopped.is_set():
                reply = own.post("/generate", json=body).json()
                if not stopped.is_set():
                    served[tenant] += reply["usage"]["completion_tokens"]

    try:
        with ThreadPoolExecutor(CROWD + FEW) as pool:
            for tenant in ["crowd"] * CROWD + ["few"] * FEW:
                pool.submit(client, tenant)
            time.sleep(2.0)  # until both are under way
            served.clear()
            time.sleep(FAIR_SECONDS)
            found = served.copy()
            stopped.set()
    finally:
        running.close()
    assert found.total() > 1000
    assert min(found["crowd"], found["few"]) / found.total() >= LEAST_SHARE, found
