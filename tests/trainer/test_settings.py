from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer import settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(settings.PREFIX)]:
        monkeypatch.delenv(name)


def test_the_defaults_work_without_an_environment():
    chosen = settings.read()
    assert (chosen.model, chosen.store, chosen.blobs) == (None, "sqlite:///.antefix/store.db", None)
    assert (chosen.device, chosen.worker_metrics_port, chosen.methods) == ("auto", 8001, {})
    assert (chosen.train_memory_mb, chosen.worker_metrics_host) == (0, "127.0.0.1")


def test_the_environment_is_read_and_the_servers_variables_passed_over(monkeypatch):
    monkeypatch.setenv("ANTEFIX_MODEL", "/models/mine")
    monkeypatch.setenv("ANTEFIX_WORKER_METRICS_PORT", "0")
    monkeypatch.setenv("ANTEFIX_DTYPE", "int8")
    monkeypatch.setenv("ANTEFIX_BLOBS", "")
    chosen = settings.read()
    assert (chosen.model, chosen.worker_metrics_port, chosen.blobs) == ("/models/mine", 0, None)


def test_methods_of_ones_own_are_files_by_name(monkeypatch):
    monkeypatch.setenv("ANTEFIX_METHODS", "low_rank.py, /srv/methods/mine.py")
    assert settings.read().methods == {"low_rank": Path("low_rank.py"), "mine": Path("/srv/methods/mine.py")}


def test_the_stores_address_may_lie_in_a_file(monkeypatch, tmp_path):
    (tmp_path / "address").write_text("redis://:secret@redis:6379/0\n")
    monkeypatch.setenv("ANTEFIX_STORE", "sqlite:///passed/over.db")
    monkeypatch.setenv("ANTEFIX_STORE_FILE", str(tmp_path / "address"))
    assert settings.read().store == "redis://:secret@redis:6379/0"
    assert "secret" not in repr(settings.read())


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("ANTEFIX_WORKER_METRICS_PORT", "many", "Input should be a valid integer"),
        ("ANTEFIX_TRAIN_MEMORY_MB", "-1", "Input should be greater than or equal to 0"),
        ("ANTEFIX_STORE_FILE", "/absent", "the file cannot be read: No such file or directory"),
        ("ANTEFIX_METHODS", "prompt.py", "prompt.py: 'prompt' is a method that is built in"),
    ],
)
def test_a_bad_value_is_named_in_one_line(monkeypatch, variable, value, reason):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=f"^antefix worker: {variable}='{value}': {reason}") as caught:
        settings.read()
    assert "\n" not in str(caught.value)
