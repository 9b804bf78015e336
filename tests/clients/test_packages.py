"""What is installed for a client is installed once, and only an index that is out of reach is a reason to skip."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.clients import packages

INSTALL = [sys.executable, "-c", "import pathlib, sys; pathlib.Path(sys.argv[1], 'package').write_text('1')"]
WORKS, FAILS = [sys.executable, "-c", ""], [sys.executable, "-c", "raise SystemExit('no such version')"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(packages, "CACHE", tmp_path / "clients")
    return tmp_path / "clients"


def test_a_folder_is_made_once_for_what_it_holds(cache: Path) -> None:
    folder = packages.kept("client", "1.0", INSTALL, WORKS)
    assert (folder / "package").read_text() == "1"
    assert packages.kept("client", "1.0", FAILS, FAILS) == folder
    assert packages.kept("client", "2.0", INSTALL, WORKS) != folder
    assert len(list(cache.iterdir())) == 2


def test_a_failure_is_skipped_only_where_the_index_is_out_of_reach(cache: Path) -> None:
    with pytest.raises(pytest.skip.Exception, match="client is not installed, and its package index cannot be reached"):
        packages.kept("client", "1.0", INSTALL, FAILS)
    with pytest.raises(AssertionError, match="no such version"):
        packages.kept("client", "1.0", FAILS, WORKS)
    assert not list(cache.iterdir())


def test_without_node_its_test_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="needs node and npm"):
        packages.node_folder("openai")
