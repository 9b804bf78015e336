"""Records out of the tables that schema 1 kept them in. Frozen: it writes the records as schema 2 began."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

TABLES = ("names", "versions", "jobs", "events", "keys")


def convert(db: sqlite3.Connection) -> None:
    """Moves every row into `records` and drops the old tables. Runs inside the transaction that upgrades the file."""
    rows = {table: [dict(row) for row in db.execute(f"SELECT * FROM {table}")] for table in TABLES}
    for key, value in _records(rows):
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        db.execute("INSERT INTO records (key, value) VALUES (?, ?)", (key, text))
    for table in TABLES:
        db.execute(f"DROP TABLE {table}")


def _records(rows: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, Any]]:
    yield from _prefixes(rows["names"], rows["versions"])
    yield from _jobs(rows["jobs"], Counter(row["job_id"] for row in rows["events"]))
    for row in rows["events"]:
        yield f"event/{row['job_id']}/{row['sequence']:09d}", {**row, "data": json.loads(row["data"])}
    for row in rows["keys"]:
        yield f"key/{row['id']}", {**row, "scopes": sorted(row["scopes"].split())}
    yield from _usage(rows)


def _prefixes(names: list[dict[str, Any]], versions: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    current: dict[tuple[str, str], int] = {}
    for row in versions:
        tenant, name, number = row["tenant"], row["name"], row["version"]
        current[tenant, name] = max(number, current.get((tenant, name), 0))
        path = f"{tenant}/{name}/{number:09d}"
        yield f"version/{path}", row
        yield f"blob/{row['digest']}/version/{path}", {}
    for row in names:
        path, last = f"{row['tenant']}/{row['name']}", row["last_version"]
        now = current.get((row["tenant"], row["name"]))
        if now is None:
            yield f"retired/{path}", {"last": last}
        else:
            yield f"name/{path}", {"last": last, "current": now}


def _jobs(jobs: list[dict[str, Any]], events: Counter[str]) -> Iterator[tuple[str, Any]]:
    for row in jobs:
        number = row["number"]
        spec, error = json.loads(row["spec"]), row["error"]
        record = {
            **row,
            "spec": spec,
            "progress": json.loads(row["progress"]),
            "error": json.loads(error) if error is not None else None,
            "cancel_requested": bool(row["cancel_requested"]),
            "events": events[row["id"]],
        }
        path = f"{row['tenant']}/{number:012d}"
        yield f"job/{row['id']}", record
        yield f"jobs/{path}", row["id"]
        yield f"blob/{spec['data_digest']}/job/{row['id']}", {}
        if row["status"] == "queued":
            yield f"queued/{path}", {"job": row["id"], "at": row["created_at"]}
        if row["status"] == "running":
            yield f"running/{path}", {"job": row["id"], "at": row["created_at"], "until": row["lease_until"]}


def _usage(rows: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, Any]]:
    usage: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"prefixes": 0, "versions": 0, "bytes": 0, "last_job": 0, "jobs": Counter()}
    )
    for tenant, _ in {(row["tenant"], row["name"]) for row in rows["versions"]}:
        usage[tenant]["prefixes"] += 1
    for row in rows["versions"]:
        usage[row["tenant"]]["versions"] += 1
        usage[row["tenant"]]["bytes"] += row["size_bytes"]
    for row in rows["jobs"]:
        mine = usage[row["tenant"]]
        mine["last_job"] = max(mine["last_job"], row["number"])
        mine["jobs"][row["status"]] += 1
    for tenant in usage.keys() | {row["tenant"] for row in rows["keys"]}:
        yield f"usage/{tenant}", usage[tenant]
        yield f"tenant/{tenant}", {"created_at": 0.0, "quotas": {}}
