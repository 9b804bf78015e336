"""Four processes, 10,000 mixed operations on one store of each kind: no update lost, no version given out twice.

Every process says what it did and what it was told; added up, that must be what the store holds afterwards.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefix_store.backends.base import Backend
from prefix_store.catalog import Catalog
from prefix_store.prefix import PrefixRef
from tests.bench.progress import say
from tests.bench.results import CACHE, Kept
from tests.prefix_store import invariants
from tests.prove.store_worker import COUNTER, NAMES, TENANT, open_backend, publish
from tests.prove.stores import at_hand, place

SECTION = "concurrent-store"
PROCESSES, OPERATIONS = 4, 10_000
ROOT = Path(__file__).parents[2]
SECONDS = 1800.0


def run(processes: int = PROCESSES, operations: int = OPERATIONS, kinds: Sequence[str] | None = None) -> dict[str, Any]:
    """Every kind of store in turn; a run that was interrupted goes on with the next kind."""
    full = (processes, operations) == (PROCESSES, OPERATIONS)
    kept = Kept(SECTION, CACHE if full else None)
    found = {
        kind: kept.part(kind, lambda kind=kind: _work_on(kind, processes, operations // processes))
        for kind in kinds or at_hand()
    }
    kept.clear()
    return {"processes": processes, "operations": operations, "kinds": found}


def missed(measured: dict[str, Any]) -> list[str]:
    """The bars that were not reached."""
    return [f"{kind}: {wrong}" for kind, found in measured["kinds"].items() for wrong in found["wrong"]]


def table(measured: dict[str, Any]) -> str:
    """For the README."""
    rows = [
        f"| {kind} | {found['done']:,} | {found['refused']:,} | {found['per_second']:,.0f} | {len(found['wrong'])} |"
        for kind, found in measured["kinds"].items()
    ]
    head = f"| {measured['processes']} processes on | done | refused | a second | lost, doubled or out of step |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def _work_on(kind: str, processes: int, each: int) -> dict[str, Any]:
    with place(kind) as where:
        backend = open_backend(where.url)
        for name in (COUNTER, *NAMES):
            publish(backend, name, name)
            # pinned, so that no name ever goes with its last version, and its aliases with it
            Catalog(backend).edit(
                PrefixRef(TENANT, name, 1), lambda version, now: replace(version, pinned=True), "local"
            )
        begun = time.monotonic()
        command = [sys.executable, "-m", "tests.prove.store_worker", where.url]
        workers = [
            subprocess.Popen([*command, f"w{index}", str(each)], cwd=ROOT, stdout=subprocess.PIPE)
            for index in range(processes)
        ]
        reports = [json.loads(worker.communicate(timeout=SECONDS)[0]) for worker in workers]
        seconds = time.monotonic() - begun
        wrong = list(_wrong(backend, reports))
        backend.close()
    done = sum((Counter(report["done"]) for report in reports), Counter())
    refused = sum((Counter(report["refused"]) for report in reports), Counter())
    say(f"{kind}: {done.total()} done, {refused.total()} refused in {seconds:.1f} s; wrong: {wrong[:3]}")
    return {
        "done": done.total(),
        "refused": refused.total(),
        "deeds": dict(done),
        "refusals": dict(refused),
        "seconds": round(seconds, 1),
        "per_second": round((done + refused).total() / seconds, 1),
        "wrong": wrong,
    }


def _wrong(backend: Backend, reports: list[dict[str, Any]]) -> list[str]:
    """What the store holds that differs from what the processes were told."""

    def told(what: str) -> list[Any]:
        return [entry for report in reports for entry in report["book"].get(what, [])]

    found = invariants.records(backend)
    published = {(name, number): digest for name, number, digest in told("published")}
    begun_with = {key for key in ((name, 1) for name in (COUNTER, *NAMES)) if key not in published}
    deleted = {(name, number) for name, number in told("deleted")}
    listed = {_name_and_number(path): version["digest"] for path, version in found["version"].items()}
    for key in begun_with:
        del listed[key]
    edits = sum(report["done"].get("edit", 0) for report in reports)
    jobs = found["job"]
    checks = {
        "a process failed for want of the store": not told("unavailable"),
        "a version was given out twice": len(published) == len(told("published")),
        "a version was deleted twice": len(deleted) == len(told("deleted")),
        "the versions are not those that were published and not deleted": listed
        == {key: digest for key, digest in published.items() if key not in deleted},
        "a number was left out": all(
            sorted(number for name, number in published.keys() | begun_with if name == each) == list(range(1, last + 1))
            for each, last in _last(found).items()
        ),
        "an edit was lost": int(found["version"][f"{TENANT}/{COUNTER}/000000001"]["metadata"]["count"]) == edits,
        "a job was lost": set(told("enqueued")) == set(jobs),
        "a job was claimed twice": len({tuple(claim) for claim in told("claimed")}) == len(told("claimed")),
        "a claim was lost": sum(job["fence"] for job in jobs.values()) == len(told("claimed")),
        "an event was lost": len(found["event"]) == len(told("claimed")),
        "a job ended otherwise": Counter(job["status"] for job in jobs.values() if job["status"] != "queued")
        == Counter({"publish": "succeeded"}.get(end, end) for _, end in told("ended") if end != "queued"),
        "an alias was lost": _aliases(found) == _expected_aliases(reports),
        "an audit line was lost": edits
        == sum(line["action"] == "prefix.edit" and line["by"] != "local" for line in found["audit"].values()),
        "a hold was left": not any("/hold/" in key for key in found["blob"]),
    }
    wrong = [what for what, holds in checks.items() if not holds]
    try:
        invariants.check(backend)
    except AssertionError as error:
        wrong.append(f"the records are out of step: {str(error)[:300]}")
    return wrong


def _name_and_number(path: str) -> tuple[str, int]:
    _, name, number = path.split("/")
    return name, int(number)


def _last(found: invariants.Records) -> dict[str, int]:
    return {path.split("/")[1]: record["last"] for path, record in (found["name"] | found["retired"]).items()}


def _aliases(found: invariants.Records) -> dict[tuple[str, str], int]:
    return {
        (name, alias): number
        for name in NAMES
        for alias, number in found["name"].get(f"{TENANT}/{name}", {}).get("aliases", {}).items()
    }


def _expected_aliases(reports: list[dict[str, Any]]) -> dict[tuple[str, str], int]:
    """Each worker's last word on its own alias of each name; one that has an alias cannot be deleted."""
    return {
        (name, f"w{index}"): target
        for index, report in enumerate(reports)
        for name, target in report["book"].get("aliased", [])
    }
