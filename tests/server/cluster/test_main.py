from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from server.cluster import __main__ as cluster
from server.settings import Settings

ROOT = Path(__file__).parents[3]


def starting(found: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """`python -m server.cluster` where Ray is, or is not, as far as it looks."""
    code = f"""
import importlib.util
importlib.util.find_spec = lambda name: {found}
from server.cluster.__main__ import main
main()
"""
    command = [sys.executable, "-c", code, "--min-replicas=1", "--max-replicas=2"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **settings}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_without_ray_one_line_says_what_to_install() -> None:
    done = starting("None")
    assert (done.returncode, done.stderr) == (1, "antefix: --ray needs Ray: pip install 'antefix[ray]'\n")


def test_a_port_that_is_taken_is_told_before_ray_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = starting("True", ANTEFIX_PORT=str(port))
    assert done.returncode == 1
    assert done.stderr.startswith(f"antefix: cannot listen on 127.0.0.1:{port}: ")


def test_an_open_server_is_refused_to_others_as_without_ray(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="would let anyone in"):
        cluster._check(Settings(store=f"sqlite:///{tmp_path}/store.db", host="0.0.0.0"))


def test_a_store_that_is_away_is_one_line() -> None:
    with pytest.raises(SystemExit, match="antefix: "):
        cluster._check(Settings(store="redis://127.0.0.1:1/0"))
