import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefix_store.cli import build, serve
from server import settings
from server.collector import PATIENCE_SECONDS

SERVER = "import time, pathlib; pathlib.Path('{name}.up').touch(); time.sleep(60)"
GRACEFUL = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit({status})); " + SERVER


def supervise(folder: Path, **modules: str) -> subprocess.Popen[str]:
    """`supervise` in a process of its own, over modules with the given code."""
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code)
    code = f"import sys; from prefix_store.cli.serve import supervise; sys.exit(supervise({list(modules)!r}))"
    env = {"PYTHONPATH": f"{folder}:{Path.cwd()}", "PATH": "/usr/bin:/bin"}
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


def wait_for(folder: Path, *names: str) -> None:
    deadline = time.monotonic() + 30
    while not all((folder / f"{name}.up").exists() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def code(name: str, status: int = 0) -> str:
    return GRACEFUL.format(name=name, status=status)


@pytest.mark.parametrize(
    ("asked", "amounts"),
    [
        ("--replicas 3", ("3", "3")),
        ("--max-replicas 4", ("1", "4")),
        ("--min-replicas 2", ("2", "2")),
    ],
)
def test_ray_takes_the_place_of_this_process_with_so_many_replicas(
    monkeypatch: pytest.MonkeyPatch, asked: str, amounts: tuple[str, str]
) -> None:
    called = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: called.append(arguments))
    monkeypatch.setattr("prefix_store.cli.serve.supervise", lambda modules: 0)
    CliRunner().invoke(build(), ["serve", "--ray", *asked.split()])
    fewest, most = amounts
    assert called[0][1:] == ["-m", "server.cluster", f"--min-replicas={fewest}", f"--max-replicas={most}"]


@pytest.mark.parametrize("asked", ["--worker", "--min-replicas 3 --max-replicas 2"])
def test_ray_refuses_a_worker_and_a_maximum_below_the_minimum(asked: str) -> None:
    result = CliRunner().invoke(build(), ["serve", "--ray", *asked.split()])
    assert result.exit_code == 1
    assert result.stderr.startswith("antefix: --ray takes no --worker")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_stops_all_and_the_status_is_the_first_s(tmp_path: Path, number: signal.Signals) -> None:
    parent = supervise(tmp_path, one=code("one", 3), two=code("two"))
    wait_for(tmp_path, "one", "two")
    parent.send_signal(number)
    _, errors = parent.communicate(timeout=10)
    assert (parent.returncode, errors) == (3, "")


def test_a_worker_that_dies_is_started_again_and_the_server_goes_on(tmp_path: Path) -> None:
    dies_once = "import pathlib, sys; first = pathlib.Path('died'); seen = first.exists(); first.touch()\n"
    parent = supervise(tmp_path, one=code("one"), two=dies_once + "if not seen: sys.exit(5)\n" + code("two"))
    wait_for(tmp_path, "one", "two")
    parent.send_signal(signal.SIGTERM)
    _, errors = parent.communicate(timeout=30)
    assert (parent.returncode, errors) == (0, "antefix: two ended (exit status 5); again in 1 s\n")


def test_when_the_server_dies_its_status_is_ours(tmp_path: Path) -> None:
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    parent = supervise(tmp_path, one=killed, two=code("two"))
    _, errors = parent.communicate(timeout=30)
    assert parent.returncode == 128 + signal.SIGKILL
    assert "one ended (signal SIGKILL)" in errors


def test_what_runs_beside_the_first_goes_behind_it(tmp_path: Path) -> None:
    parent = supervise(tmp_path, one=code("one"), two=code("two"))
    wait_for(tmp_path, "one", "two")
    listed = subprocess.run(
        ["ps", "--ppid", str(parent.pid), "-o", "ni=", "--sort", "pid"], capture_output=True, text=True, check=True
    )
    first, second = map(int, listed.stdout.split())
    parent.send_signal(signal.SIGTERM)
    parent.communicate(timeout=10)
    assert second == min(first + 15, 19)


# What a server does: says on the descriptor that it was given that it takes requests.
READY = "import os, sys; os.write(int(sys.argv[sys.argv.index('--ready-fd') + 1]), b'ready')\n"
NTH = "import pathlib; runs = pathlib.Path('runs'); runs.open('a').write('x'); nth = len(runs.read_text())\n"


@pytest.mark.parametrize(
    ("dies", "how"),
    [
        ("os.kill(os.getpid(), 9)", "signal SIGKILL"),
        ("os.kill(os.getpid(), 11)", "signal SIGSEGV"),
        ("sys.exit(7)", "exit status 7"),
    ],
)
def test_a_server_that_dies_after_it_has_served_is_started_again(tmp_path: Path, dies: str, how: str) -> None:
    parent = supervise(tmp_path, server=f"{NTH}{READY}if nth == 1: {dies}\n" + code("server"), two=code("two"))
    wait_for(tmp_path, "server", "two")
    parent.send_signal(signal.SIGTERM)
    _, errors = parent.communicate(timeout=30)
    assert (parent.returncode, errors) == (0, f"antefix: server ended ({how}); again in 1 s\n")
    assert (tmp_path / "runs").read_text() == "xx"


def test_once_it_has_served_a_start_that_fails_is_tried_again_and_later_each_time(tmp_path: Path) -> None:
    failing = f"{NTH}if nth in (2, 3): import sys; sys.exit(1)\n{READY}if nth == 1: os.kill(os.getpid(), 9)\n"
    parent = supervise(tmp_path, server=failing + code("server"))
    wait_for(tmp_path, "server")
    parent.send_signal(signal.SIGTERM)
    _, errors = parent.communicate(timeout=30)
    assert [line.rpartition("; ")[2] for line in errors.splitlines()] == [
        "again in 1 s",
        "again in 2 s",
        "again in 4 s",
    ]
    assert (parent.returncode, (tmp_path / "runs").read_text()) == (0, "xxxx")


@pytest.mark.parametrize("dies", ["sys.exit(1)", "sys.exit('antefix: no')", "os.kill(os.getpid(), 9)"])
def test_a_server_that_cannot_start_ends_at_once_with_its_status(tmp_path: Path, dies: str) -> None:
    parent = supervise(tmp_path, server=f"{NTH}import os, sys; {dies}")
    parent.communicate(timeout=30)
    assert parent.returncode == (137 if "kill" in dies else 1)
    assert (tmp_path / "runs").read_text() == "x"


def test_a_server_that_ends_in_good_order_ends_all(tmp_path: Path) -> None:
    parent = supervise(tmp_path, server=f"{NTH}{READY}", two=code("two"))
    parent.communicate(timeout=30)
    assert (parent.returncode, (tmp_path / "runs").read_text()) == (0, "x")


def test_what_has_run_for_long_is_started_again_as_quickly_as_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen(["false"])
    gone.wait()
    now = time.monotonic()
    restart = serve.Restart(delay=32.0, due=None)
    restart.after(serve.Child("one", gone, None, now - 5), is_first=True)
    assert restart.delay == serve.RESTART_SECONDS_MOST
    restart = serve.Restart(delay=32.0, due=None)
    restart.after(serve.Child("one", gone, None, now - serve.STEADY_SECONDS - 5), is_first=True)
    assert restart.delay == 2 * serve.RESTART_SECONDS


HEARS = """
import os, signal, sys, time, pathlib
def hear(number, _):
    pathlib.Path('heard').open('a').write(signal.Signals(number).name + ' ')
    if number == signal.SIGINT: sys.exit(0)
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, hear)
"""


@pytest.mark.parametrize(
    ("sent", "heard"),
    [
        ([signal.SIGINT], "SIGINT"),
        ([signal.SIGHUP], "SIGINT"),
        ([signal.SIGTERM, signal.SIGTERM], "SIGTERM SIGINT"),
        ([signal.SIGTERM, signal.SIGINT], "SIGTERM SIGINT"),
    ],
)
def test_a_server_hears_whether_there_is_time(tmp_path: Path, sent: list[signal.Signals], heard: str) -> None:
    parent = supervise(tmp_path, server=HEARS + READY + SERVER.format(name="server"))
    wait_for(tmp_path, "server")
    for number in sent:
        parent.send_signal(number)
        time.sleep(0.5)
    parent.communicate(timeout=30)
    assert (parent.returncode, (tmp_path / "heard").read_text().split()) == (0, heard.split())


def test_what_drains_is_given_longer_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.Settings.model_fields["drain_seconds"].default == serve.DRAIN_SECONDS
    monkeypatch.delenv("ANTEFIX_DRAIN_SECONDS", raising=False)
    assert serve._drain_seconds() == serve.DRAIN_SECONDS
    for text, seconds in (("45", 45.0), ("0", 0.0), ("", serve.DRAIN_SECONDS), ("soon", serve.DRAIN_SECONDS)):
        monkeypatch.setenv("ANTEFIX_DRAIN_SECONDS", text)
        assert serve._drain_seconds() == seconds
    assert serve.STOP_SECONDS > 2 + PATIENCE_SECONDS, "to shut down after the drain"


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_killing_the_parent_outright_ends_the_children(tmp_path: Path) -> None:
    leave = "def leave(*_): pathlib.Path('left').touch(); sys.exit()"
    leaves = f"import pathlib, signal, sys\n{leave}\nsignal.signal(signal.SIGTERM, leave)\n"
    parent = supervise(tmp_path, one=leaves + SERVER.format(name="one"))
    wait_for(tmp_path, "one")
    parent.kill()
    parent.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while not (tmp_path / "left").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
