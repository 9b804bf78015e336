"""A server at full load for twenty minutes: every answer as it was alone, and memory flat.

Clients ask for greedy continuations under prefixes of every method while others leave in the middle of a stream, run
into their deadline, send nonsense, and replace and delete prefixes that are being read. Every answer is compared with
what the server said to the same request and the same prefix version when it had nothing else to do.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.progress import Progress

from prefix_store.model.frozen import FrozenModel
from tests.e2e.processes import SERVER, Running
from tests.prove.bundled import load
from tests.server import artefacts

SECTION = "soak"
MINUTES, CLIENTS = 20.0, 64
STEADY, CHURNED = 120, 4  # prefixes that stay; names whose prefix is replaced and deleted all the time
KV_SLOTS = 8192  # too few for all of it: prefixes are evicted and rows preempted
TOKENS = 96  # of an answer: more than a row is sure of when it is admitted, so it may have to make way
SAMPLE_SECONDS = 5.0
SETTLED = 0.25  # share of the run after which memory is expected to be flat
FLAT = 0.02  # growth over the rest of the run that is noise, as a share of memory
TEXT = "The old man came in and said that the king would never see her house again before winter"


@dataclass
class Soak:
    """What the clients have met; `expected` maps (prefix digest, prompt) to the text that it gave alone."""

    client: httpx.AsyncClient
    expected: dict[tuple[str | None, str], str]
    names: list[str]
    churned: dict[str, list[bytes]]
    deadline: float
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def one_client(self, seed: int) -> None:
        """One request after another until the time is up."""
        draws = random.Random(seed)
        acts = {self.ask: 70, self.leave: 10, self.run_late: 5, self.replace: 6, self.remove: 3, self.blunder: 6}
        while time.monotonic() < self.deadline:
            (act,) = draws.choices(list(acts), list(acts.values()))
            await act(draws)
            self.counts[act.__name__] += 1

    async def ask(self, draws: random.Random) -> None:
        """A whole answer, plain or streamed."""
        name = draws.choice([*self.names, *self.churned])
        body = request(name, draws.choice(prompts()))
        reply = await self.client.post("/generate", json=body)
        if reply.status_code == 404 and name in self.churned:
            return  # deleted just now
        self.check(body, reply)

    async def leave(self, draws: random.Random) -> None:
        """The first bytes of a stream, and then nobody there."""
        body = request(draws.choice(self.names), draws.choice(prompts())) | {"stream": True, "max_tokens": 200}
        async with self.client.stream("POST", "/generate", json=body) as reply:
            if reply.status_code != 200:
                self.wrong.append(f"leave: {reply.status_code}")
            async for _ in reply.aiter_bytes():
                break

    async def run_late(self, draws: random.Random) -> None:
        """More tokens than its deadline allows for."""
        body = request(draws.choice(self.names), draws.choice(prompts())) | {"max_tokens": 300, "timeout_s": 0.5}
        reply = await self.client.post("/generate", json=body)
        if reply.status_code != 200:
            self.wrong.append(f"timeout: {reply.status_code} {reply.text[:200]}")

    async def replace(self, draws: random.Random) -> None:
        """Another version under a name that others are reading."""
        name = draws.choice(list(self.churned))
        file = draws.choice(self.churned[name])
        reply = await self.client.post("/v1/prefixes", data={"id": name}, files={"file": ("f", file)})
        if reply.status_code not in (200, 201):
            self.wrong.append(f"replace: {reply.status_code} {reply.text[:200]}")

    async def remove(self, draws: random.Random) -> None:
        """A name that others are reading, deleted."""
        reply = await self.client.delete(f"/v1/prefixes/{draws.choice(list(self.churned))}")
        if reply.status_code not in (200, 204, 404):
            self.wrong.append(f"remove: {reply.status_code} {reply.text[:200]}")

    async def blunder(self, draws: random.Random) -> None:
        """A request that must be refused, and never answered by the bare model."""
        body, status = draws.choice(
            [
                (request("nobody", "x"), 404),
                (request(self.names[0], "x") | {"max_token": 3}, 400),
                (request(self.names[0], "x") | {"max_tokens": 10**6}, 400),
            ]
        )
        reply = await self.client.post("/generate", json=body)
        if reply.status_code != status:
            self.wrong.append(f"blunder: {body} gave {reply.status_code}")

    def check(self, body: dict[str, Any], reply: httpx.Response) -> None:
        """Notes an answer that is not the one expected of the version that it says it is from."""
        if reply.status_code != 200:
            self.wrong.append(f"{body}: {reply.status_code} {reply.text[:200]}")
            return
        answer = reply.json()
        self.counts["tokens"] += answer["usage"]["completion_tokens"]
        if answer["text"] != self.expected[answer["prefix"]["digest"], body["prompt"]]:
            self.wrong.append(f"{body}: {answer['text']!r}")


def prompts() -> list[str]:
    """A few prompts of very different lengths."""
    return [" ".join(itertools.islice(itertools.cycle(TEXT.split()), count)) for count in (3, 40, 9, 150)]


def request(name: str, prompt: str) -> dict[str, Any]:
    """Greedy, so that the same request has the same answer."""
    return {"prefix_id": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


def files(frozen: FrozenModel, steady: int, churned: int) -> tuple[dict[str, bytes], dict[str, list[bytes]]]:
    """Prefix files by name: one for each that stays, two for each that is churned."""
    stays = {f"steady-{i}": _file(frozen, i) for i in range(steady)}
    pairs = {
        f"churned-{i}": [artefacts.native(frozen, 16, seed=10_000 + 2 * i + k) for k in (0, 1)] for i in range(churned)
    }
    return stays, pairs


def _file(frozen: FrozenModel, index: int) -> bytes:
    """Of every method in turn, and of eight lengths."""
    length = 4 + 12 * (index % 8)
    if index % 5 == 3:
        return artefacts.memory(frozen, seed=index, feature_map=("elu", "gelu")[index % 2])
    if index % 5 == 4:
        return artefacts.prompt(frozen, length, seed=index)
    return artefacts.native(frozen, length, seed=index)


def learn(
    client: httpx.Client, stays: dict[str, bytes], pairs: dict[str, list[bytes]]
) -> dict[tuple[str | None, str], str]:
    """Publishes every file and asks every request alone."""
    expected = {}
    versions = [*stays.items(), *((name, file) for name, pair in pairs.items() for file in pair)]
    for name, file in versions:
        client.post("/v1/prefixes", data={"id": name}, files={"file": ("f", file)}).raise_for_status()
        for prompt in prompts():
            answer = client.post("/generate", json=request(name, prompt)).raise_for_status().json()
            expected[answer["prefix"]["digest"], prompt] = answer["text"]
    return expected


def resident_bytes(pid: int) -> int:
    """A process's resident memory, from /proc."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


async def load_up(soak: Soak, pid: int, clients: int, minutes: float) -> list[tuple[float, int, int]]:
    """Runs the clients; (seconds, resident bytes, tokens so far), now and then."""
    begun, samples = time.monotonic(), []

    async def watch() -> None:
        with Progress(transient=True) as bar:
            shown = bar.add_task("soak", total=60 * minutes)
            while time.monotonic() < soak.deadline:
                await asyncio.sleep(min(SAMPLE_SECONDS, 60 * minutes / 20))
                samples.append((time.monotonic() - begun, resident_bytes(pid), soak.counts["tokens"]))
                bar.update(shown, completed=time.monotonic() - begun)

    await asyncio.gather(watch(), *(soak.one_client(seed) for seed in range(clients)))
    return samples


def growth(samples: list[tuple[float, int, int]]) -> float:
    """Growth of memory from `SETTLED` of the run to its end as a share, by the straight line of least squares."""
    later = samples[int(SETTLED * len(samples)) :]
    seconds, sizes = [t for t, _, _ in later], [size for _, size, _ in later]
    middle, mean = sum(seconds) / len(later), sum(sizes) / len(later)
    spread = sum((t - middle) ** 2 for t in seconds)
    slope = sum((t - middle) * (size - mean) for t, size, _ in later) / spread
    return slope * (seconds[-1] - seconds[0]) / mean


def run(
    minutes: float = MINUTES,
    clients: int = CLIENTS,
    steady: int = STEADY,
    churned: int = CHURNED,
    kv_slots: int = KV_SLOTS,
) -> dict[str, Any]:
    """Starts a server of its own, soaks it, and says what came of it."""
    stays, pairs = files(load(), steady, churned)
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{folder}/store.db"
        server = Running.start(Path(folder), *SERVER, STORE=store, KV_SLOTS=str(kv_slots))
        try:
            expected = learn(server.client, stays, pairs)
            return asyncio.run(_soaked(server, expected, list(stays), pairs, minutes, clients))
        finally:
            server.close()


async def _soaked(
    server: Running,
    expected: dict[tuple[str | None, str], str],
    names: list[str],
    pairs: dict[str, list[bytes]],
    minutes: float,
    clients: int,
) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=server.client.base_url, timeout=120, limits=limits) as client:
        soak = Soak(client, expected, names, pairs, time.monotonic() + 60 * minutes)
        samples = await load_up(soak, server.process.pid, clients, minutes)
    tokens = soak.counts.pop("tokens")
    return {
        "minutes": minutes,
        "clients": clients,
        "done": dict(soak.counts),
        "tokens_per_second": round(tokens / samples[-1][0], 1),
        "wrong": soak.wrong[:20],
        "wrong_count": len(soak.wrong),
        "resident_mib": {
            "when it had settled": round(samples[int(SETTLED * len(samples))][1] / 2**20, 1),
            "at the end": round(samples[-1][1] / 2**20, 1),
            "over time": [round(size / 2**20, 1) for _, size, _ in samples[:: max(1, len(samples) // 20)]],
        },
        "growth": round(growth(samples), 4),
        "is_flat": abs(growth(samples)) < FLAT,
        "preemptions": _counter(server.client, "antefix_num_preemptions_total"),
        "evictions": _counter(server.client, 'antefix_residency_evictions_total{tier="device"}'),
        "idle_after": _counter(server.client, "antefix_num_requests_running") == 0,
    }


def _counter(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def missed(measured: dict[str, Any]) -> list[str]:
    """The bars that were not reached."""
    bars = {
        "no wrong answer": measured["wrong_count"] == 0,
        f"memory within {FLAT:.0%}": measured["is_flat"],
        "rows preempted and prefixes evicted": min(measured["preemptions"], measured["evictions"]) > 0,
        "nothing running afterwards": measured["idle_after"],
    }
    return [bar for bar, is_met in bars.items() if not is_met]


def table(measured: dict[str, Any]) -> str:
    """For the README."""
    done = sum(measured["done"].values())
    memory = measured["resident_mib"]
    return (
        f"{measured['minutes']:.0f} minutes, {measured['clients']} clients, {done:,} requests "
        f"({measured['preemptions']:.0f} preemptions, {measured['evictions']:.0f} evictions): "
        f"{measured['wrong_count']} wrong answers; resident memory {memory['when it had settled']:.0f} MiB a quarter "
        f"through, {memory['at the end']:.0f} MiB at the end."
    )
