"""Section `http`: what HTTP costs: 64 streams from a real server against the same engine in a plain loop.

Both pay for the client: while the plain loop runs, the same client process reads as many events from a stub server.
Each round runs both, next to one another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prefix_store.geometry import ModelGeometry
from prefix_store.model import frozen as models
from prefix_store.prefix import Method, PrefixManifest
from prefix_store.store import Store
from prefix_store.tenants import DEFAULT_TENANT
from server.engine.engine import Engine
from tests.bench import goals, streams_client, workload
from tests.bench.drive import Tokens, drain, engine_of
from tests.bench.progress import say
from tests.bench.results import ROOT, Kept, paired_ratio
from tests.bench.shapes import LLAMA_150M, Shape
from tests.bench.workload import Item, W, Workload
from tests.e2e.processes import SERVER, Running

SECTION = "http"
CLIENT_SECONDS = 600.0


@dataclass(frozen=True)
class Size:
    """How much of it."""

    shape: Shape = LLAMA_150M
    workload: Workload = W
    rounds: int = 3
    slots: int = 32_768


def measure(kept: Kept, size: Size = Size()) -> dict[str, Any]:
    """Rounds of the server and of the engine alone."""
    with tempfile.TemporaryDirectory(prefix="antefix-bench-") as folder:
        bench = Bench(Path(folder), size)
        with bench.server() as server:
            bench.warm(server)
            rounds = [kept.part(f"round {n}", lambda: bench.round(server)) for n in range(size.rounds)]
    rates = {
        name: [found[name] for found in rounds] for name in ("http_tokens_per_second", "offline_tokens_per_second")
    }
    share = paired_ratio(*rates.values())
    return {
        "what": f"{size.shape.name}, float32: {size.workload.requests} streams of {size.workload.new_tokens} tokens",
        "rounds": rounds,
        "of_offline": round(share, 3),
        "server_cpu_seconds_per_1000_tokens": _middle(
            [found["server_cpu_seconds_per_1000_tokens"] for found in rounds]
        ),
        "goals": {"tokens/s lost to HTTP": goals.at_most(100 * (1 - share), 5, "%")},
    }


class Bench:
    """A model folder and a store, a server over them, and the same model and prefixes in an engine here."""

    def __init__(self, folder: Path, size: Size) -> None:
        self._folder, self._size = folder, size
        self._model, self._store = folder / "model", f"sqlite:///{folder}/store.db"
        size.shape.save(self._model)
        frozen = models.load(self._model)
        self._tokenizer = frozen.tokenizer
        self._items = size.workload.items(size.shape.vocabulary)
        self._payloads = workload.payloads(size.workload, frozen.geometry)
        self._publish(frozen.geometry)
        self._engine: Engine = engine_of(frozen, slots=size.slots, rows=size.workload.requests)

    @contextmanager
    def server(self) -> Iterator[Running]:
        """A real one."""
        settings = {
            "MODEL": str(self._model),
            "STORE": self._store,
            "KV_SLOTS": str(self._size.slots),
            "MAX_BATCH": str(self._size.workload.requests),
            "DEVICE": "cpu",
        }
        running = Running.start(self._folder, *SERVER, **settings)
        try:
            yield running
        finally:
            running.close()

    def warm(self, server: Running) -> None:
        """Every prefix is loaded once on both sides."""
        short = replace(self._size.workload, new_tokens=2)
        _client(_port(server), self._bodies(short), self._folder)
        drain(self._engine, short.requests_for(self._items, self._payloads))

    def round(self, server: Running) -> dict[str, Any]:
        """The server first: how long it takes is how long the stub is to take."""
        before = thread_seconds(server.process.pid)
        found = _client(_port(server), self._bodies(self._size.workload), self._folder)
        others = _outside_engine(server.process.pid, before, thread_seconds(server.process.pid))
        expected = len(self._items) * self._size.workload.new_tokens
        if found["tokens"] != expected:
            raise RuntimeError(f"the server said {found['tokens']} tokens, expected {expected}")
        seconds, tokens = self._offline(found)
        same = sum(self._tokenizer.decode(new) == text for new, text in zip(tokens, found["texts"], strict=True))
        result = {
            "http_tokens_per_second": round(expected / found["seconds"], 2),
            "offline_tokens_per_second": round(expected / seconds, 2),
            "server_cpu_seconds_per_1000_tokens": round(1000 * others / expected, 4),
            "client_cpu_seconds_per_1000_tokens": round(1000 * found["cpu_seconds"] / expected, 4),
            "events": found["events"],
            "streams_with_the_offline_text": same,
        }
        say(f"  {result}")
        return result

    def _offline(self, served: dict[str, Any]) -> tuple[float, Tokens]:
        """The engine's seconds for the same requests, beside a client that reads as many events from a stub."""
        streams, events = len(self._items), -(-served["events"] // len(self._items))
        stub = _start("streams_stub", str(streams), str(events), str(served["seconds"]))
        try:
            port = int(_line(stub))
            client = _start("streams_client", str(port), str(self._folder / "requests.json"))
            assert _line(client).strip() == streams_client.BEGUN
            begun = time.perf_counter()
            tokens = drain(self._engine, self._size.workload.requests_for(self._items, self._payloads))
            seconds = time.perf_counter() - begun
            read = json.loads(client.communicate(timeout=CLIENT_SECONDS)[0])
            assert read["events"] == streams * events, "the stub's events did not all arrive"
        finally:
            stub.terminate()
            stub.communicate()
        return seconds, tokens

    def _bodies(self, load: Workload) -> list[dict[str, Any]]:
        return [_body(item, load.new_tokens) for item in self._items]

    def _publish(self, geometry: ModelGeometry) -> None:
        length = self._size.workload.virtual_tokens
        manifest = PrefixManifest(Method.PREFIX, geometry, length, position_offset=length)
        store = Store.open(self._store)
        for prefix in self._payloads:
            kv: torch.Tensor = prefix.tensor
            store.prefixes.save(DEFAULT_TENANT, f"p{prefix.digest}", manifest, {"self.kv": kv})
        store.close()


def thread_seconds(pid: int) -> dict[int, float]:
    """CPU seconds of each thread of a process, as the kernel counts them."""
    found, ticks = {}, os.sysconf("SC_CLK_TCK")
    for task in Path(f"/proc/{pid}/task").iterdir():
        # after the name in brackets come the state and then numbers; 11 and 12 of these are user and system time
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        found[int(task.name)] = (int(fields[11]) + int(fields[12])) / ticks
    return found


def _outside_engine(pid: int, before: dict[int, float], after: dict[int, float]) -> float:
    """CPU seconds of all threads but the first, which is the engine's, and the busiest others, which compute for it."""
    spent = {thread: seconds - before.get(thread, 0.0) for thread, seconds in after.items() if thread != pid}
    return sum(sorted(spent.values(), reverse=True)[torch.get_num_threads() - 1 :])


def _body(item: Item, new_tokens: int) -> dict[str, Any]:
    fixed = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return {"prompt": list(item.prompt), "prefix_id": f"p{item.prefix}", **fixed}


def _client(port: int, bodies: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Runs the client process over these requests and returns what it says."""
    (folder / "requests.json").write_text(json.dumps(bodies))
    process = _start("streams_client", str(port), str(folder / "requests.json"))
    output, _ = process.communicate(timeout=CLIENT_SECONDS)
    if process.returncode:
        raise RuntimeError("the client failed")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def _start(module: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", f"tests.bench.{module}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _port(server: Running) -> int:
    port = server.client.base_url.port
    assert port is not None
    return port


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def table(measured: dict[str, Any]) -> str:
    """Both rates, the loss and its goal."""
    lines = goals.table(measured["what"], measured["goals"])
    http, offline = (
        _middle([found[f"{name}_tokens_per_second"] for found in measured["rounds"]]) for name in ("http", "offline")
    )
    cpu = measured["server_cpu_seconds_per_1000_tokens"]
    return (
        f"{lines}\n| tokens/s over HTTP, and of the engine alone beside a client | {http:.0f}, {offline:.0f} | |"
        f"\n| CPU seconds of the server outside the engine, per 1,000 tokens | {cpu:.2f} | |"
    )
