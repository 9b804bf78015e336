"""The page's code for OpenAI's client and for curl, run as printed. `tests/clients` runs that of the other clients."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from prefix_store.store import Store
from prefix_store.tenants import DEFAULT_TENANT
from server.app import create_app
from server.engine.engine import Engine
from server.engine.prefix_loader import PrefixLoader
from server.scheduler.scheduler import Limits
from tests.docs import page
from tests.models import tiny_frozen
from tests.server import artefacts, loops
from tests.server.over_http import serving

CLIENTS = Path(__file__).parents[1] / "clients"
CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = Store.open(f"sqlite:///{tmp_path_factory.mktemp('run')}/store.db")
    frozen = dataclasses.replace(tiny_frozen("llama"), name="antefix-demo")
    for name in ("plays", "carroll"):
        tensors = {"self.kv": artefacts.random_kv(frozen, 4)}
        store.prefixes.save(DEFAULT_TENANT, name, artefacts.manifest(frozen, 4), tensors)
    loop = loops.running(Engine(frozen, Limits(1024, 8, 64, 512, 64)))
    app = create_app(store, frozen, loop, PrefixLoader(store.prefixes, frozen, 1 << 20), chat_template=CHAT)
    with structlog.testing.capture_logs(), serving(app) as found:
        yield found


def test_the_python_code(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    code = page.block("clients.md", "Python", "python", url)
    names: dict[str, object] = {}
    try:
        exec(compile(code, "clients.md", "exec"), names)
    finally:
        names["client"].close()
    printed = capsys.readouterr().out
    assert "['antefix-demo', 'carroll', 'plays']" in printed
    assert "{'id': 'plays', 'version': 1, 'digest': '" in printed
    assert "completion_tokens=24" in printed


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_commands(url: str) -> None:
    block = page.block("clients.md", "curl", "console", url)
    printed = []
    for command in block.splitlines():
        assert command.startswith("$ curl ")
        done = subprocess.run(command[2:], shell=True, capture_output=True, text=True, check=True, timeout=60)
        printed.append(done.stdout)
    completion, chat, stream, model = printed
    assert json.loads(completion)["prefix"]["id"] == "plays"
    assert json.loads(chat)["choices"][0]["message"]["role"] == "assistant"
    assert stream.endswith("data: [DONE]\n\n")
    assert json.loads(model)["id"] == "plays@1"


def test_no_example_is_left_out() -> None:
    here = Path(__file__).read_text("utf-8")
    tested = here + "".join(file.read_text("utf-8") for file in CLIENTS.glob("test_*.py"))
    headings = page.code_headings("clients.md")
    assert {"Python", "curl", "LiteLLM"} <= headings
    assert not {heading for heading in headings if f'page.block("clients.md", "{heading}", ' not in tested}
