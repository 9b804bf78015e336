from __future__ import annotations

import socket

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from prefix_store.jobs import BUILT_IN_METHODS
from tests.models import save_tiny
from trainer import __main__ as program
from trainer import memory
from trainer.settings import Settings


def test_a_taken_metrics_port_costs_only_the_metrics(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        program.serve_metrics("127.0.0.1", port, CollectorRegistry())
    assert f"no metrics: 127.0.0.1:{port} cannot be opened" in capsys.readouterr().out


def test_port_zero_is_no_metrics(capsys):
    program.serve_metrics("127.0.0.1", 0, CollectorRegistry())
    assert capsys.readouterr().out == ""


def test_metrics_answer_at_the_address_that_was_chosen(capsys):
    """127.0.0.2 is this machine's too, and nobody would listen there by default."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.2", 0))
        except OSError:
            pytest.skip("this system has one loopback address")
        port = probe.getsockname()[1]
    registry = CollectorRegistry()
    Gauge("seven", "What stands there", registry=registry).set(7)
    program.serve_metrics("127.0.0.2", port, registry)
    assert f"metrics at http://127.0.0.2:{port}/metrics" in capsys.readouterr().out
    assert "seven 7.0" in httpx.get(f"http://127.0.0.2:{port}/metrics").text
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics")


def test_the_start_line_says_what_is_trained_and_where_jobs_come_from(tmp_path, capsys):
    folder = save_tiny("llama", tmp_path / "tiny")
    store = f"sqlite:///{tmp_path}/store.db"
    registry = CollectorRegistry()
    worker = program.make_worker(Settings(model=str(folder), store=store, device="cpu"), registry)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"antefix worker: {worker.name} trains tiny (")
    assert line.endswith(f"in float32 on cpu, jobs from {store}")
    assert worker.run_until_empty() == 0
    assert registry.get_sample_value("antefix_worker_steps_total") == 0.0


@pytest.mark.parametrize(("megabytes", "expected"), [(3, 3 << 20), (0, 5)])
def test_steps_may_take_what_was_said_or_half_of_what_is_free(tmp_path, monkeypatch, megabytes, expected):
    monkeypatch.setattr(memory, "free", lambda device: 5)
    folder = save_tiny("llama", tmp_path / "tiny")
    chosen = Settings(
        model=str(folder), store=f"sqlite:///{tmp_path}/store.db", device="cpu", train_memory_mb=megabytes
    )
    assert program.make_worker(chosen, CollectorRegistry()).load[2] == expected


def test_a_method_of_ones_own_stands_in_the_start_line(tmp_path, capsys):
    folder = save_tiny("llama", tmp_path / "tiny")
    (tmp_path / "mine.py").write_text("METHOD = print")
    chosen = Settings(
        model=str(folder), store=f"sqlite:///{tmp_path}/store.db", device="cpu", methods=f"{tmp_path}/mine.py"
    )
    program.make_worker(chosen, CollectorRegistry())
    assert f" by {', '.join(BUILT_IN_METHODS)}, mine in float32 " in capsys.readouterr().out


def test_a_method_that_cannot_be_used_ends_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("ANTEFIX_STORE", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.setenv("ANTEFIX_METHODS", f"{tmp_path}/absent.py")
    with pytest.raises(SystemExit, match=r"absent\.py: there is no such file"):
        program.main()
    assert not (tmp_path / "store.db").exists(), "it is looked at before all else"


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ANTEFIX_MODEL", "/absent", "no such folder"),
        ("ANTEFIX_STORE", "redis+odd://user:secret@host", "store address"),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_line(variable, value, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ANTEFIX_STORE", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.setenv(variable, value)
    assert program.main() == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert words in line
    assert "secret" not in line
