"""LiteLLM's completions and chat completions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.clients.calls import Expected, check_errors, printed, python_program, question
from tests.clients.packages import environment
from tests.docs import page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    return environment("litellm")


def test_it_answers_as_generate_does(url: str, expected: Expected, variables: dict[str, str], tmp_path: Path) -> None:
    read = python_program("litellm_calls.py", question(url), variables, tmp_path)
    expected.check(read, "completion", "chat")
    check_errors(read, *["NotFoundError"] * 4)


def test_the_pages_example(url: str, expected: Expected, variables: dict[str, str], tmp_path: Path) -> None:
    code = page.block("clients.md", "LiteLLM", "python", url)
    shown = printed([sys.executable, "-c", code], variables, tmp_path)
    assert expected.texts["plays"]["completion"] in shown
