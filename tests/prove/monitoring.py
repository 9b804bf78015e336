"""A real Prometheus on a real server and worker under mixed load: every panel has data, every alert rule works.

The committed configuration, rules and dashboard are what is used; only the addresses are others. Then the worker and
the server are killed, and the alerts that are for that must go off.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from tests.bench import plots
from tests.e2e.processes import ROOT, SERVER, START_SECONDS, STOP_SECONDS, Running, free_port
from tests.prove import boards, prometheus
from tests.prove.boards import Query
from tests.prove.bundled import load
from tests.prove.prometheus import Prometheus
from tests.server import artefacts

SECTION = "monitoring"
MINUTES, CLIENTS, TENANTS, PREFIXES = 4.0, 12, 60, 4
PATIENCE_SECONDS = 600.0  # of a client: on a machine with other work this is about what is shown, not how fast
KV_SLOTS = "4096"  # too few for every tenant's prefixes: some are evicted, some rows preempted
RATE_SECONDS = 60  # what Grafana asks rates over, where scrapes are 15 s apart
ALERT_SECONDS = 240.0  # within which an alert goes off: two minutes that it waits, and lease, scrape and evaluation
# What goes off after which process is killed.
EXPECTED = {"worker": {"AntefixWorkerSilent", "AntefixTrainerDown"}, "server": {"AntefixServerDown"}}
SHOWN = (
    *("Tokens a second", "Time to first token", "Different prefixes in a step"),
    *("Loads and evictions a second", "Tokens a second by tenant", "Jobs by state"),
)
MOST_LINES = 6
TEXT = re.findall(r"\w+", "The old man came in and said that the king would never see her house again before winter")


def run(minutes: float = MINUTES, clients: int = CLIENTS, tenants: int = TENANTS) -> dict[str, Any]:
    """Starts everything, asks Prometheus under load, then kills the worker and the server."""
    prometheus.check_installed()
    checked = [
        prometheus.promtool("check", "config", "--syntax-only", str(boards.CONFIG)),
        prometheus.promtool("check", "rules", str(boards.RULES)),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name), f"sqlite:///{name}/store.db"
        keys = _keys(store, tenants)
        (folder / "metrics_key").write_text(keys["watcher"])
        port = free_port()
        server = Running.start(folder, *SERVER, STORE=store, KV_SLOTS=KV_SLOTS)
        try:
            _publish(server, keys, load())
            with _worker(folder, store, port) as worker:
                config = folder / "prometheus.yml"
                targets = {
                    "antefix-server": f"127.0.0.1:{server.client.base_url.port}",
                    "antefix-trainer": f"127.0.0.1:{port}",
                }
                config.write_text(yaml.safe_dump(boards.config(str(folder / "metrics_key"), targets)))
                checked.append(prometheus.promtool("check", "config", str(config)))
                with Prometheus(config) as watching:
                    begun = time.time()
                    _train(server, keys)
                    done = asyncio.run(_load(server, keys, clients, minutes, lambda: _asked(watching, begun)))
                    lints = [_lint(server, keys), _lint_worker(port)]
                    return {
                        "prometheus": prometheus.version(),
                        "minutes": minutes,
                        "clients": clients,
                        "tenants": tenants,
                        "promtool": [text.replace(f"{folder}/", "").replace(f"{ROOT}/", "") for text in checked],
                        "lints": lints,
                        **done,
                        "killed": {
                            "worker": _killed(watching, worker, EXPECTED["worker"]),
                            "server": _killed(watching, server.process, EXPECTED["server"]),
                        },
                    }
        finally:
            server.close()


def missed(measured: dict[str, Any]) -> list[str]:
    """The bars that were not reached."""
    bars = {
        "both targets up": set(measured["targets"].values()) == {"up"},
        "every panel's query returns data": not measured["empty"],
        "every alert rule evaluates": all(health == "ok" for health in measured["rules"].values()),
        "no alert while all is well": not measured["firing"],
        "no fault by promtool": not any(measured["lints"]),
        "the load is answered": not measured["failed"],
        "the alerts for a killed process go off": all(
            EXPECTED[name] <= found.keys() for name, found in measured["killed"].items()
        ),
    }
    return [bar for bar, is_met in bars.items() if not is_met]


def table(measured: dict[str, Any]) -> str:
    """For the README."""
    scrape = measured["scrape"]
    killed = [
        f"{process.capitalize()} killed: "
        + ", ".join(f"{alert} after {seconds:.0f} s" for alert, seconds in found.items())
        for process, found in measured["killed"].items()
    ]
    return (
        f"Prometheus {measured['prometheus']}, {measured['minutes']:g} minutes, {measured['clients']} clients of "
        f"{measured['tenants']} tenants, a worker training: {measured['queries']} queries of {measured['panels']} "
        f"panels, {len(measured['empty'])} without data; {len(measured['rules'])} alert rules, "
        f"{sum(health != 'ok' for health in measured['rules'].values())} faulty, {len(measured['firing'])} firing; "
        f"a scrape of the server is {scrape['samples']:.0f} samples in at most {1000 * scrape['seconds']:.0f} ms. "
        f"{'. '.join(killed)}."
    )


def plot(measured: dict[str, Any]) -> Path:
    """Some of the dashboard's panels, as Prometheus has them; of many lines the largest."""
    shown = []
    for panel in measured["curves"]:
        largest = sorted(panel["curves"].items(), key=lambda curve: -sum(curve[1][1]))[:MOST_LINES]
        shown.append(plots.Panel("s", panel["title"], {name: (x, y) for name, (x, y) in largest}))
    return plots.draw("monitoring.svg", shown, columns=3)


def _keys(store: str, tenants: int) -> dict[str, str]:
    """A key for each tenant by its name, and one for Prometheus."""
    opened = Store.open(store)
    try:
        made = {f"tenant-{index:02}": ["generate", "prefix:write", "train"] for index in range(tenants)}
        return {name: opened.keys.create(name, scopes)[0] for name, scopes in (made | {"watcher": ["metrics"]}).items()}
    finally:
        opened.close()


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _publish(server: Running, keys: dict[str, str], frozen: FrozenModel) -> None:
    for number, (tenant, key) in enumerate(keys.items()):
        for index in range(PREFIXES if tenant != "watcher" else 0):
            file = artefacts.native(frozen, 16 + 16 * index, seed=PREFIXES * number + index)
            form = {"data": {"id": f"p{index}"}, "files": {"file": ("f", file)}}
            server.client.post("/v1/prefixes", headers=_bearer(key), **form).raise_for_status()


@contextmanager
def _worker(folder: Path, store: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANTEFIX_")}
    environment |= {"ANTEFIX_STORE": store, "ANTEFIX_WORKER_METRICS_PORT": str(port), "PYTHONPATH": str(ROOT)}
    log = folder / "worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer"], cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while b"metrics at" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_SECONDS)


def _train(server: Running, keys: dict[str, str]) -> None:
    """A job that ends soon, and one that goes on for longer than all of this."""
    examples = [{"prompt": " ".join(TEXT[:index]), "completion": " " + TEXT[index]} for index in range(1, len(TEXT))]
    for tenant, steps in (("tenant-00", 5), ("tenant-01", 100_000)):
        options = {"examples": examples, "steps": steps, "virtual_tokens": 4, "batch_size": 2, "publish_anyway": True}
        reply = server.client.post("/v1/prefixes/mine/train", json=options, headers=_bearer(keys[tenant]))
        reply.raise_for_status()


async def _load(
    server: Running, keys: dict[str, str], clients: int, minutes: float, ask: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Clients for so long, and then what `ask` finds while they go on."""
    tenants = [name for name in keys if name != "watcher"]
    counts: Counter[str] = Counter()
    failed: list[str] = []
    stopping = asyncio.Event()
    async with httpx.AsyncClient(base_url=server.client.base_url, timeout=PATIENCE_SECONDS) as client:

        async def one_client(seed: int) -> None:
            draws = random.Random(seed)
            while not stopping.is_set():
                tenant = draws.choices(tenants, [1 / (1 + index) for index in range(len(tenants))])[0]
                act = draws.choices((_ask, _leave, _blunder, _upload), (85, 5, 5, 5))[0]
                counts[act.__name__.strip("_")] += 1
                if (fault := await act(client, _bearer(keys[tenant]), draws)) is not None:
                    failed.append(fault)

        running = [asyncio.create_task(one_client(seed)) for seed in range(clients)]
        await asyncio.sleep(60 * minutes)
        found = await asyncio.to_thread(ask)
        stopping.set()
        await asyncio.gather(*running)
    return {"done": dict(counts), "failed": failed[:20], **found}


def _request(draws: random.Random) -> dict[str, Any]:
    words = itertools.islice(itertools.cycle(TEXT), draws.choice((3, 9, 40, 100)))
    prefix = draws.choice([None, *(f"p{index}" for index in range(PREFIXES))])
    body = {"prompt": " ".join(words), "max_tokens": draws.choice((8, 16, 48)), "ignore_eos": True}
    return body if prefix is None else body | {"prefix_id": prefix}


async def _ask(client: httpx.AsyncClient, key: dict[str, str], draws: random.Random) -> str | None:
    reply = await client.post("/generate", json=_request(draws), headers=key)
    return None if reply.status_code == 200 else f"ask: {reply.status_code} {reply.text[:200]}"


async def _leave(client: httpx.AsyncClient, key: dict[str, str], draws: random.Random) -> str | None:
    body = _request(draws) | {"stream": True, "max_tokens": 100}
    async with client.stream("POST", "/generate", json=body, headers=key) as reply:
        async for _ in reply.aiter_bytes():
            break
    return None if reply.status_code == 200 else f"leave: {reply.status_code}"


async def _blunder(client: httpx.AsyncClient, key: dict[str, str], draws: random.Random) -> str | None:
    reply = await client.post("/generate", json=_request(draws) | {"prefix_id": "nobody"}, headers=key)
    return None if reply.status_code == 404 else f"blunder: {reply.status_code}"


async def _upload(client: httpx.AsyncClient, key: dict[str, str], draws: random.Random) -> str | None:
    file = {"file": ("f", draws.randbytes(100))}
    reply = await client.post("/v1/prefixes", data={"id": "p0"}, files=file, headers=key)
    return None if reply.status_code == 400 else f"upload: {reply.status_code}"


def _asked(watching: Prometheus, begun: float) -> dict[str, Any]:
    """Every panel's queries, every alert's condition, and some panels over time."""
    panels, alerts = boards.panels(), boards.alerts()
    empty = [f"{query.title}: {query.text}" for query in panels if not _has_data(watching, query)]
    for alert in alerts:
        watching.query(alert.text)  # raises where it has a fault; without an answer all is well
    rules = {rule["name"]: rule["health"] for rule in watching.rules()}
    assert rules.keys() == {alert.title for alert in alerts}
    targets = watching.targets()
    scraped = 'scrape_{}{{job="antefix-server"}}'
    return {
        "targets": {job: target["health"] for job, target in targets.items()},
        "queries": len(panels),
        "panels": len({query.title for query in panels}),
        "empty": empty,
        "rules": rules,
        "firing": sorted(_firing(watching)),
        "scrape": {
            "samples": float(watching.query(scraped.format("samples_scraped"))[0]["value"][1]),
            "seconds": float(watching.query(f"max_over_time({scraped.format('duration_seconds')}[5m])")[0]["value"][1]),
        },
        "curves": [{"title": title, "curves": _curves(watching, title, begun)} for title in SHOWN],
    }


def _has_data(watching: Prometheus, query: Query) -> bool:
    series = watching.query(query.asked(RATE_SECONDS))
    return any(math.isfinite(float(found["value"][1])) for found in series)


def _curves(watching: Prometheus, title: str, begun: float) -> dict[str, list[list[float]]]:
    """A panel's lines: seconds since the beginning, and values."""
    curves: dict[str, list[list[float]]] = {}
    for query in boards.panels():
        if query.title == title:
            for series in watching.over_time(query.asked(RATE_SECONDS), begun, 15):
                name = query.legend
                for label, value in series["metric"].items():
                    name = name.replace(f"{{{{{label}}}}}", value)
                points = [(at - begun, float(value)) for at, value in series["values"] if value != "NaN"]
                curves[name] = [[round(at, 1) for at, _ in points], [float(f"{value:.4g}") for _, value in points]]
    return curves


def _lint(server: Running, keys: dict[str, str]) -> str:
    text = server.client.get("/metrics", headers=_bearer(keys["watcher"])).raise_for_status().text
    return prometheus.promtool("check", "metrics", given=text)


def _lint_worker(port: int) -> str:
    return prometheus.promtool("check", "metrics", given=httpx.get(f"http://127.0.0.1:{port}/metrics").text)


def _killed(watching: Prometheus, process: subprocess.Popen[bytes], expected: set[str]) -> dict[str, float]:
    """Which alerts go off after it was killed, and after how many seconds; ends once those expected are among them."""
    before = _firing(watching)
    process.kill()
    process.wait()
    begun, found = time.monotonic(), dict[str, float]()
    while time.monotonic() - begun < ALERT_SECONDS and not expected <= found.keys():
        time.sleep(1)
        for name in _firing(watching) - before:
            found.setdefault(name, round(time.monotonic() - begun, 1))
    return found


def _firing(watching: Prometheus) -> set[str]:
    return {rule["name"] for rule in watching.rules() if rule["state"] == "firing"}
