from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from prefix_store.cli import plot
from prefix_store.cli.client import Failure

POINT: dict[str, Any] = {"train_loss": 2.0, "valid_loss": None, "learning_rate": 0.1, "tokens_per_second": 5.0}
JOB = {"id": "ftjob-x", "prefix_id": "$x_", "status": "running"}
CURVE = [{**POINT, "step": 1}, {**POINT, "step": 2, "valid_loss": 1}]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_report_becomes_a_picture(tmp_path: Path, length: int) -> None:
    plot.draw({"job": JOB, "curve": CURVE[:length]}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("report", [{"job": JOB}, {"job": JOB, "curve": [{}]}, {"job": 3, "curve": []}])
def test_what_is_no_report_is_one_line(tmp_path: Path, report: dict[str, Any]) -> None:
    with pytest.raises(Failure, match="does not answer as an antefix server"):
        plot.draw(report, tmp_path / "a.png")


def test_a_file_that_cannot_be_written_and_a_library_that_is_missing_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit):
        plot.draw({"job": JOB, "curve": []}, tmp_path / "no" / "a.png")
    assert "cannot be written: No such file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(typer.Exit):
        plot.check_installed()
    assert "pip install 'antefix[plot]'" in capsys.readouterr().err
