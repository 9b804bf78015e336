"""OpenAI's client for Node.js."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.calls import MODELS, Expected, check_errors, node_program, printed, question
from tests.clients.packages import environment, node_folder
from tests.docs import page

pytestmark = pytest.mark.slow
# the last line of versions that runs on Node.js 20
PACKAGE = "openai@6.30.1"


@pytest.fixture(scope="module")
def folder() -> Path:
    return node_folder(PACKAGE)


def test_it_answers_as_generate_does(url: str, expected: Expected, folder: Path) -> None:
    read = node_program("openai_calls.mjs", question(url), environment(), folder)
    expected.check(read, "completion", "chat")
    assert set(MODELS[:2]) < set(read["models"])
    check_errors(read, *["NotFoundError"] * 4)
    assert {error["code"] for error in read["errors"]} == {"model_not_found"}


def test_the_pages_example(url: str, expected: Expected, folder: Path) -> None:
    code = page.block("clients.md", "Node.js", "javascript", url)
    shown = printed(["node", "--input-type=module", "--eval", code], environment(), folder)
    assert expected.texts["plays"]["completion"] in shown
    assert "completion_tokens" in shown  # sampled: it may end before its 24
