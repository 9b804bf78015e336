from __future__ import annotations

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


def test_a_port_to_be_chosen_is_refused_before_anything_starts() -> None:
    done = starting("True", ANTEFIX_PORT="0")
    assert (done.returncode, done.stderr) == (1, "antefix: ANTEFIX_PORT=0: Ray Serve needs a port by its number\n")


def chosen(folder: Path, **settings: object) -> Settings:
    return Settings(**{"store": f"sqlite:///{folder}/store.db", **settings})


@pytest.mark.parametrize(
    "settings", [{}, {"host": "0.0.0.0"}, {"store": "redis://127.0.0.1:1/0"}], ids=["both", "sqlite", "loopback"]
)
def test_a_store_or_an_address_of_one_machine_does_not_do_for_two(tmp_path: Path, settings: dict[str, str]) -> None:
    with pytest.raises(SystemExit, match=r"the Ray cluster has 2 machines.*redis://…, and an ANTEFIX_HOST"):
        cluster._check(chosen(tmp_path, **settings), machines=2)


def test_an_open_server_is_refused_to_others_as_without_ray(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="would let anyone in"):
        cluster._check(chosen(tmp_path, host="0.0.0.0"), machines=1)


def test_a_store_that_is_away_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="antefix: "):
        cluster._check(chosen(tmp_path, store="redis://127.0.0.1:1/0"), machines=1)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "antefix-demo"),
        ({"model": "/models/gpt2/"}, "gpt2"),
        ({"model": "org/name"}, "name"),
        ({"model": "org/name", "model_name": "mine"}, "mine"),
    ],
)
def test_the_base_model_is_known_by_the_name_that_replicas_give_it(tmp_path: Path, settings: dict, name: str) -> None:
    assert cluster._check(chosen(tmp_path, **settings), machines=1) == name
