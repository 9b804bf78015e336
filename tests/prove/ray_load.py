"""A closed load on one or several servers, each answer with the replica that gave it, and the processes behind."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

TOKENS = 64
REPLICA = "x-antefix-replica"
ACTOR = "ServeReplica:antefix:Replica"


@dataclass(frozen=True)
class Answer:
    """One request, from when it was sent to when it was answered, in seconds since some moment."""

    prefix: str
    replica: str
    sent: float
    answered: float


@dataclass
class Load:
    """What the clients met; every request has `TOKENS` tokens. A client does nothing twice."""

    urls: Sequence[str]
    weights: dict[str, float]
    seconds: float
    answers: list[Answer] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    async def run(self, clients: int) -> Load:
        """All clients at once, until the time is up."""
        self.deadline = time.monotonic() + self.seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
        async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:
            await asyncio.gather(*(self._client(client, random.Random(seed)) for seed in range(clients)))
        return self

    async def _client(self, client: httpx.AsyncClient, draws: random.Random) -> None:
        names, weights = list(self.weights), list(self.weights.values())
        while time.monotonic() < self.deadline:
            (name,) = draws.choices(names, weights)
            url = self.urls[names.index(name) % len(self.urls)]  # clients that know two servers split the prefixes
            body = {"prefix_id": name, "prompt": "The king", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
            sent = time.monotonic()
            try:
                reply = await client.post(f"{url}/generate", json=body)
            except httpx.HTTPError as error:
                self.failed.append(repr(error))
                continue
            if reply.status_code != 200 or reply.json()["usage"]["completion_tokens"] != TOKENS:
                self.failed.append(f"{reply.status_code} {reply.text[:200]}")
                continue
            self.answers.append(Answer(name, reply.headers.get(REPLICA, url), sent, time.monotonic()))

    @property
    def tokens_per_second(self) -> float:
        """Of what was answered in time."""
        in_time = sum(answer.answered <= self.deadline for answer in self.answers)
        return TOKENS * in_time / self.seconds


def spread(answers: Sequence[Answer]) -> dict[str, float]:
    """Affinity, the share of requests that went where most of their prefix's did; and the busiest replica's share."""
    by_prefix: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        by_prefix[answer.prefix][answer.replica] += 1
    at_home = sum(max(counts.values()) for counts in by_prefix.values())
    busiest = max(Counter(answer.replica for answer in answers).values())
    return {"affinity": round(at_home / len(answers), 4), "busiest": round(busiest / len(answers), 4)}


async def ask_each(url: str, names: Sequence[str]) -> list[str]:
    """One token of every prefix, all at once; what failed."""
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
        bodies = [{"prefix_id": name, "prompt": "x", "max_tokens": 1} for name in names]
        replies = await asyncio.gather(*(client.post(f"{url}/generate", json=body) for body in bodies))
    return [f"{reply.status_code} {reply.text[:200]}" for reply in replies if reply.status_code != 200]


def longest(answers: Sequence[Answer], moment: float) -> float:
    """Seconds that the slowest request took of those that were under way at a moment."""
    under_way = [answer.answered - answer.sent for answer in answers if answer.sent < moment <= answer.answered]
    return max(under_way, default=0.0)


def processes(launcher: int) -> dict[int, int]:
    """Replicas that a launcher has started: the server's process and its actor's."""
    parents = {pid: _parent(pid) for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*"))}
    found = {}
    for pid, parent in parents.items():
        above = list(itertools.takewhile(lambda one: one > 1, _chain(parents, pid)))
        if launcher in above and " -m server --ready-fd" in _arguments(pid) and ACTOR in _arguments(parent):
            found[pid] = parent
    return found


def _chain(parents: dict[int, int], pid: int) -> Iterator[int]:
    while pid:
        yield pid
        pid = parents.get(pid, 0)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _arguments(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
