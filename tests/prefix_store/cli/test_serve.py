import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
