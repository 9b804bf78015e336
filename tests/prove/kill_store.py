"""kill -9 at 200 random moments of publishing, switching, deleting and collecting, and of the server underneath.

After every kill the store must be one that could have come about without it: whatever a process was told has happened
is there, every listed version can be read and is whole, no number is given out twice, the counts are right. In the
end the holds of the dead lapse, and what only they held is collected.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefix_store.backends.blobs import FolderBlobs
from prefix_store.errors import AntefixError
from prefix_store.store import Store
from tests.bench.progress import say
from tests.bench.results import CACHE, Kept
from tests.prefix_store import invariants
from tests.prove import killed_writers
from tests.prove.killed_writers import HOLDING, HOUR
from tests.prove.stores import Place, at_hand, place

SECTION = "kill-store"
KILLS, CHUNK = 200, 20
SHARES = {"sqlite": 2, "redis": 1, "valkey": 1}  # of the kills
SERVER_EVERY = 3  # how often the server is killed with its clients
ROOT = Path(__file__).parents[2]


class Ledger:
    """What is known of a store from what its writers told, and what it must therefore hold."""

    def __init__(self) -> None:
        self.told: Counter[str] = Counter()
        self.digests: dict[tuple[str, int], str] = {}
        self.doomed: set[tuple[str, int]] = set()
        self.gone: set[tuple[str, int]] = set()
        self.cut_off: Counter[str] = Counter()
        self.wrong: list[str] = []

    def hear(self, lines: list[Any]) -> None:
        """One round's reports."""
        last: dict[int, str] = {}
        for process, _, what, told in lines:
            self.told[what] += 1
            last[process] = what
            if what == "published":
                name, number, digest = told
                if (name, number) in self.digests and self.digests[name, number] != digest:
                    self.wrong.append(f"{name}@{number} was given out twice")
                self.digests[name, number] = digest
            if what == "deleting":
                self.doomed.add((told[0], told[1]))
            if what == "deleted":
                if (told[0], told[1]) in self.gone:
                    self.wrong.append(f"{told} was deleted twice")
                self.gone.add((told[0], told[1]))
        self.cut_off.update(what for what in last.values() if what.endswith("ing"))

    def check(self, store: Store) -> None:
        """Compares with what is there now."""
        try:
            invariants.check(store.backend)
            invariants.check_whole(store)
            self._check_versions(store)
        except (AssertionError, AntefixError) as error:
            self.wrong.append(f"{type(error).__name__}: {str(error)[:300]}")

    def _check_versions(self, store: Store) -> None:
        found = invariants.records(store.backend)
        listed = {}
        for path, version in found["version"].items():
            _, name, number = path.split("/")
            listed[name, int(number)] = version["digest"]
        for key, digest in listed.items():
            assert self.digests.setdefault(key, digest) == digest, f"{key} is another one now"
        assert not listed.keys() & self.gone, "what was deleted is back"
        lost = self.digests.keys() - listed.keys() - self.doomed
        assert not lost, f"lost: {sorted(lost)[:5]}"
        highest: Counter[str] = Counter()
        for name, number in self.digests:
            highest[name] = max(highest[name], number)
        for path, record in (found["name"] | found["retired"]).items():
            assert record["last"] >= highest[path.split("/")[1]], "a number could be given out again"


def run(kills: int = KILLS, kinds: Sequence[str] | None = None) -> dict[str, Any]:
    """Every kind of store in turn, in chunks; a run that was interrupted goes on with the next chunk."""
    kept = Kept(SECTION, CACHE if kills == KILLS else None)
    kinds = kinds or at_hand()
    shares = sum(SHARES[kind] for kind in kinds)
    found: dict[str, Any] = {}
    for kind in kinds:
        share = kills * SHARES[kind] // shares
        chunks = [min(CHUNK, share - start) for start in range(0, share, CHUNK)]
        with killed_writers.short_chunks():
            parts = [
                kept.part(f"{kind} {number}", lambda number=number, size=size, kind=kind: _chunk(kind, number, size))
                for number, size in enumerate(chunks)
            ]
        found[kind] = _total(parts)
    kept.clear()
    return {"kills": sum(each["kills"] for each in found.values()), "kinds": found}


def missed(measured: dict[str, Any]) -> list[str]:
    """The bars that were not reached."""
    return [f"{kind}: {wrong}" for kind, found in measured["kinds"].items() for wrong in found["wrong"]]


def table(measured: dict[str, Any]) -> str:
    """For the README."""
    rows = [
        f"| {kind} | {found['kills']} | {found['server_kills']} | {found['told'].get('published', 0):,} | "
        f"{sum(found['cut_off'].values())} | {len(found['wrong'])} |"
        for kind, found in measured["kinds"].items()
    ]
    head = "| store | kills of two writers | and of the server | versions published | cut off half-way | found wrong |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def _chunk(kind: str, number: int, size: int) -> dict[str, Any]:
    """Kills on one store, and the burial of what they left."""
    draws = random.Random(f"{kind} {number}")
    ledger, server_kills, left, begun = Ledger(), 0, 0, time.monotonic()
    with place(kind) as where, _writers(where) as writers:
        for index in range(size):
            with_server = where.server is not None and index % SERVER_EVERY == SERVER_EVERY - 1
            server_kills += with_server
            round_ = {"seed": 1000 * number + index, "after": draws.randint(1, 25), "seconds": draws.uniform(0, 0.05)}
            ledger.hear(_round(where, writers, round_, draws.uniform(0, 0.4) if with_server else None))
            store = Store.open(where.url)
            ledger.check(store)
            left += sum("/hold/" in key for key in invariants.records(store.backend)["blob"])
            store.close()
        _bury(where, ledger)
    say(f"{kind} chunk {number}: {size} kills in {time.monotonic() - begun:.0f} s, wrong: {ledger.wrong[:3]}")
    return {
        "kills": size,
        "server_kills": server_kills,
        "told": dict(ledger.told),
        "cut_off": dict(ledger.cut_off),
        "holds_seen": left,
        "wrong": ledger.wrong,
    }


def _round(
    where: Place, writers: subprocess.Popen[str], round_: dict[str, Any], server_after: float | None
) -> list[Any]:
    assert writers.stdin is not None
    assert writers.stdout is not None
    killer = threading.Timer(server_after or 0.0, where.server.stop) if server_after and where.server else None
    writers.stdin.write(json.dumps(round_) + "\n")
    writers.stdin.flush()
    if killer is not None:
        killer.start()
    lines = []
    while (line := json.loads(writers.stdout.readline())) != "end":
        lines.append(line)
    if killer is not None and where.server is not None:
        killer.join()
        where.server.start()
    return lines


def _bury(where: Place, ledger: Ledger) -> None:
    """Hours later: nothing is held, and the blobs are those that records name."""
    later = Store.open(where.url, clock=lambda: time.time() + HOLDING + HOUR)
    later.collect()
    ledger.check(later)
    named = {key.partition("/")[0] for key in invariants.records(later.backend)["blob"]}
    if any("/hold/" in key for key in invariants.records(later.backend)["blob"]):
        ledger.wrong.append("a hold outlived its time")
    if set(later.blobs.digests()) != named:
        ledger.wrong.append("the blobs are not those that records name")
    if isinstance(later.blobs, FolderBlobs) and any((later.blobs.root / "tmp").iterdir()):
        ledger.wrong.append("a temporary file was left")
    later.close()


@contextmanager
def _writers(where: Place) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.prove.killed_writers", where.url]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.stdin.close()


def _total(parts: list[dict[str, Any]]) -> dict[str, Any]:
    told = sum((Counter(part["told"]) for part in parts), Counter())
    cut_off = sum((Counter(part["cut_off"]) for part in parts), Counter())
    return {
        "kills": sum(part["kills"] for part in parts),
        "server_kills": sum(part["server_kills"] for part in parts),
        "told": dict(told),
        "cut_off": dict(cut_off),
        "holds_seen": sum(part["holds_seen"] for part in parts),
        "wrong": [wrong for part in parts for wrong in part["wrong"]],
    }
