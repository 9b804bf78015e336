from __future__ import annotations

import os

import pytest

from trainer import settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(settings.PREFIX)]:
        monkeypatch.delenv(name)


def test_the_defaults_work_without_an_environment():
    chosen = settings.read()
    assert (chosen.model, chosen.store, chosen.blobs) == (None, "sqlite:///.antefix/store.db", None)
    assert (chosen.device, chosen.worker_metrics_port) == ("auto", 8001)


def test_the_environment_is_read_and_the_servers_variables_passed_over(monkeypatch):
    monkeypatch.setenv("ANTEFIX_MODEL", "/models/mine")
    monkeypatch.setenv("ANTEFIX_WORKER_METRICS_PORT", "0")
    monkeypatch.setenv("ANTEFIX_DTYPE", "bfloat16")
    monkeypatch.setenv("ANTEFIX_BLOBS", "")
    chosen = settings.read()
    assert (chosen.model, chosen.worker_metrics_port, chosen.blobs) == ("/models/mine", 0, None)


def test_a_bad_value_is_named_in_one_line(monkeypatch):
    monkeypatch.setenv("ANTEFIX_WORKER_METRICS_PORT", "many")
    with pytest.raises(SystemExit, match="ANTEFIX_WORKER_METRICS_PORT='many'"):
        settings.read()
