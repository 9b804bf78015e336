"""huggingface_hub's InferenceClient."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.clients.calls import Expected, check_errors, generated, printed, python_program, question
from tests.clients.packages import environment
from tests.docs import page
from tests.e2e.processes import Running

pytestmark = pytest.mark.slow


def test_it_answers_as_generate_does(url: str, expected: Expected, tmp_path: Path) -> None:
    read = python_program("hub_calls.py", question(url), environment(), tmp_path)
    expected.check(read, "chat")
    check_errors(read, *["HfHubHTTPError"] * 2)
    assert [error["status"] for error in read["errors"]] == [404, 404]


def test_the_pages_example(server: Running, url: str, tmp_path: Path) -> None:
    code = page.block("clients.md", "huggingface_hub", "python", url)
    messages = [{"role": "user", "content": "Who is at the door?"}]
    ids = server.client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    shown = printed([sys.executable, "-c", code], environment(), tmp_path)
    assert shown == generated(server.client, "carroll", ids, max_tokens=24)
