"""Whatever dies, fills up or slows down: requests fail clearly or not at all, no answer is wrong, and nothing is lost.

Clients ask without pause, and one publishes, while the server, the trainer and the store's server are killed with
`kill -9`, the disk under the store fills up, and the store becomes slow. Of each fault: how many requests failed and
how, and the seconds until everything worked again without anybody's help.
"""

from __future__ import annotations

import time
from typing import Any

from tests.bench.progress import say
from tests.bench.results import CACHE, Kept
from tests.prove.bundled import load as load_model
from tests.prove.faulty_stage import Stage, is_whole, on_redis, on_small_disk, summary, wait_until
from tests.server import artefacts

SECTION = "faults"
CLIENTS, SETTLE = 16, 8.0
AWAY_SECONDS = 15.0  # that Redis stays dead
FULL_SECONDS = 15.0  # that the disk stays full
SLOW = {"200 ms": (0.2, 15.0), "5 s": (5.0, 25.0)}  # how late each of the store's answers is, and for how long
LENGTHS = (4, 8, 16, 24)  # of the prefixes that are published meanwhile
JOB: dict[str, Any] = {"method": "prefix", "virtual_tokens": 8, "steps": 30, "seed": 3}
EXAMPLES = [
    {"prompt": f"Question {number}:", "completion": f" the answer is {number * 7 % 11}."} for number in range(9)
]
KILL_AT = 6  # steps of the job
# How much longer than before a stream may wait for a token. One that waited for the store would wait for seconds.
SLOWER, GAP_MS = 2.0, 500.0


def run(clients: int = CLIENTS, settle: float = SETTLE) -> dict[str, Any]:
    """Every fault, one after another; a run that was cut off goes on behind the last stage that it had finished."""
    files = make_files()
    kept = Kept(SECTION, CACHE)

    def with_redis() -> dict[str, Any]:
        with on_redis(files, clients, settle) as stage:
            found = {"server killed": told("server killed", server_killed(stage))}
            found["Redis killed"] = told("Redis killed", redis_killed(stage))
            for late, (delay, seconds) in SLOW.items():
                name = f"store late by {late}"
                found[name] = told(name, store_slow(stage, delay, seconds))
            return found

    def with_disk() -> dict[str, Any]:
        try:
            with on_small_disk(files, clients, settle) as stage:
                return {"disk full": told("disk full", disk_full(stage))}
        except PermissionError as error:
            say(f"disk full: left out, {error}")
            return {}

    def with_trainer() -> dict[str, Any]:
        with on_redis(files, clients, settle) as stage:
            return {"trainer killed": told("trainer killed", trainer_killed(stage))}

    faults: dict[str, Any] = {}
    for name, measure in (("redis", with_redis), ("disk", with_disk), ("trainer", with_trainer)):
        faults |= kept.part(name, measure)
    kept.clear()
    return {"clients": clients, "faults": faults, "left_out": [] if "disk full" in faults else ["disk full"]}


def make_files() -> list[bytes]:
    """Prefixes of the bundled model, to be published."""
    model = load_model()
    return [artefacts.native(model, length, seed=number) for number, length in enumerate(LENGTHS)]


def told(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Says it, and hands it on."""
    say(f"{name}: {found}")
    return found


def server_killed(stage: Stage) -> dict[str, Any]:
    """The supervisor starts it again."""
    with stage.loaded() as load:
        at = time.monotonic()
        stage.kill("server")
        wait_until(lambda: is_whole(stage.client), "the server")
        wait_until(lambda: load.first_right(at), "an answer")
    first = load.first_right(at)
    assert first is not None
    return summary(load, stage.lost(), first - at)


def redis_killed(stage: Stage, away: float = AWAY_SECONDS) -> dict[str, Any]:
    """It is started again after some seconds, in which the server goes on with what it knows."""
    assert stage.redis is not None
    with stage.loaded() as load:
        at = time.monotonic()
        stage.redis.stop()
        time.sleep(away)
        served = sum(at < asked for asked, _ in load.right)
        degraded = stage.client.get("/readyz").json()
        published = len(load.published)
        stage.redis.start()
        back = time.monotonic()
        wait_until(lambda: is_whole(stage.client) and len(load.published) > published, "the store")
        whole = time.monotonic() - back
    return summary(load, stage.lost(), whole, away_seconds=away, answered_without_store=served, readyz=degraded)


def store_slow(stage: Stage, delay: float, seconds: float) -> dict[str, Any]:
    """Every answer of the store is late; streams that run do not wait for it."""
    assert stage.proxy is not None
    with stage.loaded() as load:
        begun = time.monotonic()
        stage.proxy.delay = delay
        time.sleep(seconds)
        stage.proxy.delay = 0.0
        ended = time.monotonic()
        published = len(load.published)
        wait_until(lambda: is_whole(stage.client) and len(load.published) > published, "the store")
        whole = time.monotonic() - ended
    waits = [answered - asked for asked, answered in load.right if begun <= asked < ended]
    return summary(
        load,
        stage.lost(),
        whole,
        gap_p99_ms={
            "before": round(1000 * load.gap_percentile(99, 0.0, begun), 1),
            "meanwhile": round(1000 * load.gap_percentile(99, begun, ended), 1),
        },
        worst_gap_ms={
            "before": round(1000 * load.worst_gap(0.0, begun), 1),
            "meanwhile": round(1000 * load.worst_gap(begun, ended), 1),
        },
        longest_answer_seconds=round(max(waits, default=0.0), 1),
    )


def trainer_killed(stage: Stage, job: dict[str, Any] = JOB) -> dict[str, Any]:
    """Its job ends with the bytes that it has undisturbed, once its lease has lapsed and another takes it up."""
    alone = _train(stage, "taught-alone", job)
    wait_until(lambda: _job(stage, alone)["status"] == "succeeded", "the undisturbed job")
    with stage.loaded() as load:
        killed = _train(stage, "taught-killed", job)
        wait_until(lambda: (_job(stage, killed).get("progress") or {}).get("step", 0) >= KILL_AT, "the job's steps")
        at = time.monotonic()
        stage.kill("trainer")
        wait_until(lambda: _job(stage, killed)["status"] not in ("running", "queued"), "the job")
        whole = time.monotonic() - at
    ended = _job(stage, killed)
    digests = [
        stage.client.get(f"/v1/prefixes/{name}").json().get("digest") for name in ("taught-alone", "taught-killed")
    ]
    lost = stage.lost()
    if ended["status"] != "succeeded" or digests[0] != digests[1] or digests[0] is None:
        lost.append(f"the job: {ended['status']}, {digests}")
    return summary(load, lost, whole, attempts=ended.get("attempt"))


def disk_full(stage: Stage, full: float = FULL_SECONDS) -> dict[str, Any]:
    """Nothing can be written for some seconds, neither records nor blobs."""
    assert stage.disk is not None
    with stage.loaded() as load:
        filler = stage.disk / "filler"
        fill(filler)
        at = time.monotonic()
        time.sleep(full)
        served = sum(at < asked for asked, _ in load.right)
        published = len(load.published)
        refused = sum(at < when for when, _ in load.refused)
        filler.unlink()
        freed = time.monotonic()
        wait_until(lambda: is_whole(stage.client) and len(load.published) > published, "the disk")
        whole = time.monotonic() - freed
    left = [path.name for path in (stage.disk / "blobs" / "tmp").iterdir()]
    return summary(load, stage.lost() + left, whole, refused_meanwhile=refused, answered_meanwhile=served)


def fill(filler: Any) -> None:
    """Takes every byte that is free."""
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError:
                continue


def missed(measured: dict[str, Any]) -> list[str]:
    """The bars that were not reached."""
    found = [f"{name}: not to be had on this machine" for name in measured["left_out"]]
    for name, fault in measured["faults"].items():
        bars = {
            "no wrong answer": not fault["wrong"],
            "nothing lost": not fault["lost"],
            "every failure is clear": not fault["unclear"],
        }
        if name != "server killed":
            bars["no request failed"] = not fault["failed"]
        if "worst_gap_ms" in fault:
            bars["no stream stalls"] = all(
                fault[gap]["meanwhile"] < SLOWER * fault[gap]["before"] + GAP_MS
                for gap in ("gap_p99_ms", "worst_gap_ms")
            )
        if "refused_meanwhile" in fault:
            bars["uploads were refused"] = fault["refused_meanwhile"] > 0
            bars["requests were answered"] = fault["answered_meanwhile"] > 0
        if "answered_without_store" in fault:
            bars["requests were answered"] = fault["answered_without_store"] > 0
        found += [f"{name}: {bar}" for bar, is_met in bars.items() if not is_met]
    return found


def table(measured: dict[str, Any]) -> str:
    """For the README."""
    lines = [
        f"| {measured['clients']} clients while | requests | failed | wrong | lost | whole again after |",
        "|---|---|---|---|---|---|",
    ]
    for name, fault in measured["faults"].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in fault["failed"].items())
        lines.append(
            f"| {name} | {fault['requests']:,} | {kinds or 0} | {len(fault['wrong'])} | {len(fault['lost'])} "
            f"| {fault['whole_seconds']:.1f} s |"
        )
    return "\n".join(lines)


def _train(stage: Stage, name: str, job: dict[str, Any]) -> str:
    reply = stage.client.post(f"/v1/prefixes/{name}/train", json={"examples": EXAMPLES, **job})
    found: str = reply.raise_for_status().json()["job"]["id"]
    return found


def _job(stage: Stage, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = stage.client.get(f"/v1/jobs/{job_id}").raise_for_status().json()
    return found
