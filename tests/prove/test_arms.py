"""Runs are made once, whoever asks and however often; a run that fails leaves nothing behind."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path

import pytest

from tests.prove.arms import Runs, abreast

# Prints what it was asked, and notes that it was asked at all.
MODULE = """
import json, pathlib, sys
run = json.loads(sys.argv[2])
with open(sys.argv[1], "a") as file:
    file.write("once ")
print("progress")
print(json.dumps({"twice": 2 * run["number"]})) if run["number"] < 9 else sys.exit("no such run")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "one_run.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "one_run"


def test_a_run_is_made_once_and_found_again(tmp_path: Path, module: str) -> None:
    asked = tmp_path / "asked"
    for _ in range(2):
        runs = Runs(tmp_path / "runs.jsonl", module, str(asked))
        assert [runs.of({"number": number})["twice"] for number in (1, 2, 1)] == [2, 4, 2]
    assert asked.read_text().split() == ["once"] * 2


def test_a_run_that_fails_is_not_kept_and_ends_the_others(tmp_path: Path, module: str) -> None:
    runs = Runs(tmp_path / "runs.jsonl", module, str(tmp_path / "asked"))
    numbers = [0, 9, 1, 2, 3, 4, 5]
    with pytest.raises(subprocess.CalledProcessError):
        abreast([partial(runs.of, {"number": number}) for number in numbers])
    kept = (tmp_path / "runs.jsonl").read_text()
    assert '"number": 0' in kept
    assert '"number": 9' not in kept
    assert '"number": 5' not in kept


def test_abreast_keeps_the_order() -> None:
    assert abreast([partial(divmod, number, 3) for number in range(7)]) == [divmod(number, 3) for number in range(7)]
