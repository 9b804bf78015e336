"""The compose proof's own arithmetic; the proof itself needs containers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.prove import compose, containers

CALM = {"command_seconds": 1.0, "works_after_seconds": 2.0, "answered": 40, "failed": {}}
GOOD: dict[str, Any] = {
    "by": "docker compose",
    "seconds": {"upload a prefix": 0.2},
    "clients": 8,
    "restarts": {"trainer": CALM, "redis": CALM, "server": {**CALM, "failed": {"ConnectError": 3, "503 busy": 2}}},
    "key_mode": "0600",
    "uploads": {"stored": 30, "refused": 1},
    "kept": {"prefixes": 40, "jobs": 2},
    "lost": [],
    "wrong": [],
}


def test_a_server_that_restarts_may_refuse_and_nothing_else_may() -> None:
    assert compose.missed(GOOD) == []
    refused = {**CALM, "failed": {"503 store_unavailable": 1}}
    for bad in (
        {"key_mode": "0644"},
        {"lost": ["written-3"]},
        {"wrong": ["uploaded answers otherwise"]},
        {"restarts": GOOD["restarts"] | {"trainer": refused}},
        {"restarts": GOOD["restarts"] | {"redis": refused}},
    ):
        assert len(compose.missed(GOOD | bad)) == 1, bad


def test_the_table_says_what_failed_and_what_was_kept() -> None:
    shown = compose.table(GOOD)
    assert "| upload a prefix | 0.2 |" in shown
    assert "| server | 2.0 | 40 | 2 × 503 busy, 3 × ConnectError |" in shown
    assert "| trainer | 2.0 | 40 | 0 |" in shown
    assert "40 versions and 2 jobs were there: 0 lost, 0 wrong." in shown


def test_what_is_gone_or_otherwise_is_a_change_and_what_is_new_is_none() -> None:
    before = {"prefixes": {"a@1": "x", "b@1": "y"}, "jobs": {"j": "succeeded"}}
    assert compose.changed(before, {"prefixes": {**before["prefixes"], "c@1": "z"}, "jobs": before["jobs"]}) == []
    after = {"prefixes": {"a@1": "z"}, "jobs": {"j": "queued"}}
    assert compose.changed(before, after) == ["prefixes: a@1", "prefixes: b@1", "jobs: j"]


def test_a_failure_is_named_as_the_client_sees_it() -> None:
    request = httpx.Request("POST", "http://x")
    reply = httpx.Response(503, json={"error": {"code": "store_unavailable"}}, request=request)
    assert compose.how(httpx.HTTPStatusError("", request=request, response=reply)) == "503 store_unavailable"
    page = httpx.Response(502, text="<html>", request=request)
    assert compose.how(httpx.HTTPStatusError("", request=request, response=page)) == "502"
    assert compose.how(httpx.ReadError("")) == "ReadError"


def test_without_an_engine_and_a_rig_there_is_no_proof(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(containers, "RIG", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="needs a Docker engine with compose, or the rig"):
        containers.program()
