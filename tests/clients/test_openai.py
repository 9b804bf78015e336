"""OpenAI's client for Python, in a process of its own against a real server. `tests/server` has all that it can ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.calls import MODELS, Expected, check_errors, python_program, question
from tests.clients.packages import environment

pytestmark = pytest.mark.slow


def test_it_answers_as_generate_does(url: str, expected: Expected, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    read = python_program("openai_calls.py", question(url), environment(), tmp_path)
    expected.check(read, "completion", "chat")
    assert set(MODELS[:2]) < set(read["models"])
    check_errors(read, *["NotFoundError"] * 4)
    assert {error["code"] for error in read["errors"]} == {"model_not_found"}
