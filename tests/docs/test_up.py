"""`docker/up`, with a program in compose's place that notes what it is asked and answers as a server would."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPOSE = """#!/usr/bin/env bash
echo "$*" >>asked
case "$*" in
  *"redis-cli ping") echo PONG ;;
  *"antefix key ls") cat keys 2>/dev/null || true ;;
  *"antefix key new"*) echo "afx_$(printf %08d "$(wc -l <asked)")_$(printf 'b%.0s' {1..43})" ;;
esac
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "docker").mkdir()
    shutil.copy(ROOT / "docker" / "up", tmp_path / "docker" / "up")
    (tmp_path / "compose").write_text(COMPOSE)
    (tmp_path / "compose").chmod(0o755)
    return tmp_path


def up(place: Path, **variables: str) -> str:
    """What it prints."""
    environment = {"PATH": "/usr/bin:/bin", "COMPOSE": "./compose", **variables}
    done = subprocess.run([place / "docker" / "up"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def asked(place: Path) -> list[str]:
    return (place / "asked").read_text().splitlines()


def test_the_key_is_made_once_and_lies_where_it_is_said_to(place: Path) -> None:
    said = up(place)
    made = place / ".antefix" / "compose" / "admin.key"
    key = made.read_text()
    assert (made.stat().st_mode & 0o777, ".antefix/compose/admin.key" in said) == (0o600, True)
    assert asked(place)[-1] == "-f docker-compose.yml up --detach"
    (place / "keys").write_text(f"{key.split('_')[1]}\tdefault\tadmin\n")
    up(place)
    assert made.read_text() == key


@pytest.mark.parametrize(("end", "is_kept"), [("until 2031-01-01 00:00", True), ("expired 2021-01-01 00:00", False)])
def test_a_key_that_has_expired_is_made_anew(place: Path, end: str, is_kept: bool) -> None:
    up(place)
    made = place / ".antefix" / "compose" / "admin.key"
    key = made.read_text()
    (place / "keys").write_text(f"other000\tdefault\tadmin\n{key.split('_')[1]}\tdefault\tadmin\t{end}\n")
    up(place)
    assert (made.read_text() == key) == is_kept


def test_an_override_is_taken_along_and_comes_last(place: Path) -> None:
    (place / "docker-compose.override.yml").touch()
    up(place, PROFILES="gpu,edge")
    files = "-f docker-compose.yml -f docker/gpu.yml -f docker-compose.override.yml --profile edge"
    assert {line.partition(" --profile edge")[0] + " --profile edge" for line in asked(place)} == {files}


@pytest.mark.parametrize(
    "line",
    [
        "SECRETS=kept",
        'SECRETS="kept"',
        "SECRETS='kept'  # here",
        "SECRETS=kept # here",
        "export SECRETS=kept",
        "SECRETS=kept\r",
    ],
)
def test_a_setting_in_the_file_is_read_as_compose_reads_it(place: Path, line: str) -> None:
    (place / ".env").write_bytes(f"ANTEFIX_PORT=8123 # free\n{line}\n".encode())
    said = up(place)
    assert (place / "kept" / "admin.key").is_file()
    assert "http://127.0.0.1:8123;" in said
