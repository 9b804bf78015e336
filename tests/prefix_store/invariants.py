"""What must hold of a store's records whatever was done to it. Reads them as they lie; nobody may write meanwhile."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from prefix_store.backends.base import Backend, walk
from prefix_store.migration import FOLDERS
from prefix_store.store import Store

Records = dict[str, dict[str, Any]]


def records(backend: Backend) -> Records:
    """Every record by its folder and the rest of its key."""
    return {folder: dict(walk(backend, f"{folder}/")) for folder in FOLDERS}


def check(backend: Backend) -> None:
    """Raises AssertionError, with what is wrong."""
    found = records(backend)
    _check_names(found)
    _check_blobs(found)
    _check_jobs(found)
    assert counted(found) == recounted(found)


def check_whole(store: Store) -> None:
    """Every version that is listed can be read, and is what its digest says."""
    for path in records(store.backend)["version"]:
        tenant, name, number = path.split("/")
        (version,) = store.prefixes.versions(tenant, name, int(number) - 1, 1)
        assert store.prefixes.read(version)


def counted(found: Records) -> dict[str, Any]:
    """What the store says each tenant has; noughts left out."""
    return {tenant: _without_noughts(usage) for tenant, usage in found["usage"].items() if _without_noughts(usage)}


def recounted(found: Records) -> dict[str, Any]:
    """What each tenant has, by looking."""
    usage: dict[str, Any] = defaultdict(
        lambda: {"prefixes": 0, "versions": 0, "bytes": 0, "last_job": 0, "jobs": Counter()}
    )
    for path in found["name"]:
        usage[_owner(path)]["prefixes"] += 1
    for path, version in found["version"].items():
        usage[_owner(path)]["versions"] += 1
        usage[_owner(path)]["bytes"] += version["size_bytes"]
    for path, file in found["file"].items():
        usage[_owner(path)]["bytes"] += file["size_bytes"]
    for job in found["job"].values():
        usage[job["tenant"]]["jobs"][job["status"]] += 1
        usage[job["tenant"]]["last_job"] = max(usage[job["tenant"]]["last_job"], job["number"])
    return {tenant: _without_noughts(counts) for tenant, counts in usage.items() if _without_noughts(counts)}


def _check_names(found: Records) -> None:
    shared, expiry = set(), set()
    numbers: dict[str, list[int]] = defaultdict(list)
    for path, version in found["version"].items():
        name, _, number = path.rpartition("/")
        numbers[name].append(int(number))
        assert (name, int(number)) == (f"{version['tenant']}/{version['name']}", version["version"])
        if version.get("expires_at") is not None:
            expiry.add(f"{int(1000 * version['expires_at']):015d}/{path}")
    for name, record in found["name"].items():
        assert {record["current"], *record.get("aliases", {}).values()} <= set(numbers[name]), name
        assert record["last"] >= max(numbers[name])
        shared |= {f"{reader}/{name}" for reader in record.get("shared", [])}
    assert found["name"].keys() == numbers.keys()
    assert not found["name"].keys() & found["retired"].keys()
    assert (shared, expiry) == (set(found["shared"]), set(found["expiry"]))


def _check_blobs(found: Records) -> None:
    named = {f"{entry['digest']}/version/{path}" for path, entry in found["version"].items()}
    named |= {f"{entry['digest']}/version/{path}" for path, entry in found["tombstone"].items()}
    named |= {f"{job['spec']['data_digest']}/job/{job_id}" for job_id, job in found["job"].items()}
    named |= {f"{file['digest']}/file/{file['id']}" for file in found["file"].values()}
    checkpoints = {job_id: job["checkpoint"] for job_id, job in found["job"].items() if job.get("checkpoint")}
    named |= {f"{digest}/checkpoint/{job_id}" for job_id, digest in checkpoints.items()}
    assert not any(found["job"][job_id]["status"] in ("succeeded", "failed", "cancelled") for job_id in checkpoints)
    assert named == {key for key in found["blob"] if "/hold/" not in key}
    assert not found["version"].keys() & found["tombstone"].keys()


def _check_jobs(found: Records) -> None:
    places: dict[str, dict[str, str]] = {folder: {} for folder in ("jobs", "queued", "running")}
    for job_id, job in found["job"].items():
        path = f"{job['tenant']}/{job['number']:012d}"
        places["jobs"][path] = job_id
        if job["status"] in ("queued", "running"):
            places[job["status"]][path] = job_id
    assert places["jobs"] == found["jobs"]
    for folder in ("queued", "running"):
        assert places[folder] == {path: entry["job"] for path, entry in found[folder].items()}
    events = Counter(path.partition("/")[0] for path in found["event"])
    assert events == Counter({job_id: job["events"] for job_id, job in found["job"].items() if job["events"]})


def _owner(path: str) -> str:
    return path.partition("/")[0]


def _without_noughts(usage: dict[str, Any]) -> dict[str, Any]:
    counts = {**usage, "jobs": {status: count for status, count in usage.get("jobs", {}).items() if count}}
    return {name: count for name, count in counts.items() if count}
