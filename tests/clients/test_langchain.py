"""LangChain's models for OpenAI's routes."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest

from tests.clients.calls import MAX_TOKENS, MESSAGES, Expected, check_errors, printed, python_program, question
from tests.clients.packages import environment
from tests.docs import page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    return environment("langchain")


def test_it_answers_as_generate_does(url: str, expected: Expected, variables: dict[str, str], tmp_path: Path) -> None:
    read = python_program("langchain_calls.py", question(url), variables, tmp_path)
    expected.check(read, "completion", "chat")
    assert read["batch"] == [expected.texts["plays"]["completion"]] * 2
    own = httpx.post(f"{url}/tokenize", json={"messages": MESSAGES}).json()["count"]
    numbers = {name: read["usage"][name] for name in ("input_tokens", "output_tokens", "total_tokens")}
    assert numbers == {"input_tokens": own, "output_tokens": MAX_TOKENS, "total_tokens": own + MAX_TOKENS}
    # LangChain has a class of its own for the code `model_not_found` of a chat
    check_errors(read, *["NotFoundError"] * 2, *["OpenAIModelNotFoundError"] * 2)


def test_the_pages_example(url: str, expected: Expected, variables: dict[str, str], tmp_path: Path) -> None:
    code = page.block("clients.md", "LangChain", "python", url)
    shown = printed([sys.executable, "-W", "ignore", "-c", code], variables, tmp_path)
    completion = f"{expected.texts['plays']['completion']}\n"
    assert shown.startswith(completion)
    assert shown.removeprefix(completion).strip()
