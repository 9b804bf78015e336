"""kill -9 at 20 random moments of training, on every kind of store, with jobs alone and jobs that share their steps.

Every job must end well and be published once. One that ran alone must have the bytes of the undisturbed run; one that
shared its steps the same steps over the same data, and a validation loss within a thousandth. Then a worker is frozen
past its lease while another does its jobs: whatever it writes afterwards must be refused.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefix_store.errors import AntefixError
from prefix_store.jobs import JobStatus
from prefix_store.store import Store
from tests.bench.progress import say
from tests.prefix_store import invariants
from tests.prove.stores import at_hand, place

SECTION = "kill-worker"
KILLS, STEPS = 20, 200
KINDS = ("sqlite", "redis")
CLOSE = 1e-3
HOURS = 7200.0
ROOT = Path(__file__).parents[2]
TENANTS = ("acme", "beta")
EXAMPLES = [
    {"prompt": f"{number} and {number + 1} is", "completion": f" {2 * number + 1}" * (1 + number % 3)}
    for number in range(30)
]
Ask = Callable[[dict[str, Any]], dict[str, Any]]
# What the jobs of a set differ in, besides their seeds.
OPTIONS = (
    {},
    {"method": "prompt"},
    {"virtual_tokens": 6, "batch_size": 2},
    {"learning_rate": 0.2},
    {"patience": 9},
    {},
)


def run(kills: int = KILLS, kinds: Sequence[str] = KINDS, steps: int = STEPS) -> dict[str, Any]:
    """So many kills on each kind of store, half of them of jobs alone."""
    with tempfile.TemporaryDirectory(prefix="antefix-") as folder:
        calm = undisturbed(f"sqlite:///{folder}/store.db", steps)
    return {"kinds": {kind: disturbed(kind, kills, steps, calm) for kind in kinds if kind in at_hand()}, "steps": steps}


def missed(measured: dict[str, Any]) -> list[str]:
    """The bars that were not reached."""
    return [f"{kind}: {wrong}" for kind, found in measured["kinds"].items() for wrong in found["wrong"]]


def table(measured: dict[str, Any]) -> str:
    """For the README."""
    rows = [
        f"| {kind} | {found['kills']} | {found['jobs']} | {found['taken_up']} "
        f"| {found['same_bytes']} of {found['alone']} | {found['furthest']:.0e} | {found['late_writers']} "
        f"| {len(found['wrong'])} |"
        for kind, found in measured["kinds"].items()
    ]
    head = (
        "| store | kills of a worker | jobs | taken up from a checkpoint | alone: same bytes as undisturbed "
        "| together: furthest loss | jobs of a frozen worker, refused | found wrong |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows])


def undisturbed(url: str, steps: int) -> dict[str, Any]:
    """What each job comes to alone, with nothing happening to it."""
    store = Store.open(url)
    names = _submit(store, "calm", steps)
    with _workers(url) as ask:
        ask({"name": "calm", "packed": False, "after": None, "seconds": 0.0})
    found = {name.removeprefix("calm-"): outcome(store, tenant, name) for tenant, name in names}
    store.close()
    return found


def disturbed(kind: str, kills: int, steps: int, calm: dict[str, Any]) -> dict[str, Any]:
    """Both sets of jobs on one store, and the frozen worker."""
    draws, begun = random.Random(kind), time.monotonic()
    wrong: list[str] = []
    with place(kind) as where, _workers(where.url) as ask:
        store = Store.open(where.url)
        done = {}
        for label, share in {"alone": kills // 2, "packed": kills - kills // 2}.items():
            names = _submit(store, label, steps)
            reach = share and len(names) * steps // (3 * share)
            struck, after = 0, reach
            for number in range(share):
                # thrice before it gets any further, and a job is rightly given up
                after = draws.randint(1 if after >= reach else reach, 2 * reach)
                round_ = {"name": f"{label}-{number}", "packed": label == "packed"}
                struck += ask({**round_, "after": after, "seconds": draws.uniform(0, 0.05)})["killed"]
                wrong += _whole(store)
            ask({"name": "last", "packed": label == "packed", "after": None, "seconds": 0.0})
            if struck < share:
                wrong.append(f"{label}: the jobs ended before the kills, {struck} of {share}")
            done[label] = {name: outcome(store, tenant, name) for tenant, name in names}
        wrong += judge(done, calm)
        late = _frozen(store, ask, steps, wrong)
        store.close()
        wrong += _bury(where.url)
    shared = {name.removeprefix("packed-"): found for name, found in done["packed"].items()}
    say(f"{kind}: {kills} kills in {time.monotonic() - begun:.0f} s, wrong: {wrong[:3]}")
    return {
        "kills": kills,
        "jobs": sum(map(len, done.values())),
        "taken_up": sum(found["taken_up"] for some in done.values() for found in some.values()),
        "alone": len(done["alone"]),
        "same_bytes": sum(same(found, calm[name.removeprefix("alone-")]) for name, found in done["alone"].items()),
        "furthest": max(furthest(found, calm[name]) for name, found in shared.items()),
        "late_writers": late,
        "seconds": round(time.monotonic() - begun, 1),
        "wrong": wrong,
    }


def _submit(store: Store, label: str, steps: int) -> list[tuple[str, str]]:
    """A set of jobs, of both tenants in turn; tenants and names."""
    names = []
    for number, options in enumerate(OPTIONS):
        tenant, name = TENANTS[number % 2], f"{label}-{number}"
        small = {"virtual_tokens": 4, "steps": steps, "batch_size": 4, "max_length": 48, "seed": number}
        store.jobs.submit(tenant, name, EXAMPLES, {**small, "publish_anyway": True, **options})
        names.append((tenant, name))
    return names


def outcome(store: Store, tenant: str, name: str) -> dict[str, Any]:
    """What became of a job: its state, its versions, and what it told of each step, the last time that it took it."""
    (job,) = (job for job in store.jobs.jobs(tenant, None, 1000) if job.name == name)
    events = store.jobs.events(tenant, job.id, 0, 100_000)
    losses = {str(e.data["step"]): [e.data["train_loss"], e.data["valid_loss"]] for e in events if e.kind == "metrics"}
    told = [event.data["message"] for event in events if event.kind == "message"]
    return {
        "status": job.status.value,
        "error": job.error and job.error.code,
        "digests": [version.digest for version in store.prefixes.versions(tenant, name)],
        "losses": losses,
        "taken_up": sum(message.startswith("going on from") for message in told),
        "events": len(events),
    }


def judge(done: dict[str, dict[str, Any]], calm: dict[str, Any]) -> list[str]:
    """What is wrong with jobs that were disturbed, beside the same undisturbed."""
    wrong = []
    for label, jobs in done.items():
        for name, found in jobs.items():
            expected = calm[name.removeprefix(f"{label}-")]
            if found["status"] != JobStatus.SUCCEEDED:
                wrong.append(f"{name} ended {found['status']} ({found['error']})")
            elif len(found["digests"]) != 1:
                wrong.append(f"{name} was published {len(found['digests'])} times")
            elif label == "alone" and not same(found, expected):
                wrong.append(f"{name} has other bytes than undisturbed")
            elif found["losses"].keys() != expected["losses"].keys():
                wrong.append(f"{name} told of other steps than undisturbed")
            elif furthest(found, expected) > CLOSE:
                wrong.append(f"{name} has a loss {furthest(found, expected):.1e} from the undisturbed one")
    return wrong


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether the published files are byte for byte the same."""
    return bool(found["digests"] == expected["digests"])


def furthest(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference between losses of the same step, in training and validation: other data shows in it."""
    pairs = [
        (one, other)
        for step in found["losses"].keys() & expected["losses"].keys()
        for one, other in zip(found["losses"][step], expected["losses"][step], strict=True)
        if one is not None and other is not None
    ]
    return max((abs(one - other) for one, other in pairs), default=0.0)


def _frozen(store: Store, ask: Ask, steps: int, wrong: list[str]) -> int:
    """How many jobs a frozen worker had to leave; what it wrote all the same is wrong."""
    names = _submit(store, "frozen", steps)
    told = ask({"after": len(names) * steps // 4})
    lost = told["first"].count("lost")
    finished = told["second"].count(JobStatus.SUCCEEDED)
    if not told["well"] or set(told["first"]) != {"lost"} or lost != finished or finished != len(names):
        wrong.append(f"frozen past its lease: {told}")
    for tenant, name in names:
        found = outcome(store, tenant, name)
        if found["status"] != JobStatus.SUCCEEDED or len(found["digests"]) != 1:
            wrong.append(f"{name} ended {found['status']} with {len(found['digests'])} versions")
    return int(lost)


def _whole(store: Store) -> list[str]:
    """Right after a kill."""
    try:
        invariants.check(store.backend)
        invariants.check_whole(store)
    except (AssertionError, AntefixError) as error:
        return [f"{type(error).__name__}: {str(error)[:300]}"]
    return []


def _bury(url: str) -> list[str]:
    """Hours later the blobs are those that records name, and nothing is left of any checkpoint."""
    later = Store.open(url, clock=lambda: time.time() + HOURS)
    later.collect()
    wrong = _whole(later)
    named = invariants.records(later.backend)["blob"]
    if any("/hold/" in key or "/checkpoint/" in key for key in named):
        wrong.append("a hold or a checkpoint outlived its job")
    if set(later.blobs.digests()) != {key.partition("/")[0] for key in named}:
        wrong.append("the blobs are not those that records name")
    later.close()
    return wrong


@contextmanager
def _workers(url: str) -> Iterator[Ask]:
    """A process to fork workers from: takes a round, gives what came of it."""
    command = [sys.executable, "-m", "tests.prove.killed_worker", url]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()

        def ask(round_: dict[str, Any]) -> dict[str, Any]:
            print(json.dumps(round_), file=process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer

        try:
            yield ask
        finally:
            process.stdin.close()
