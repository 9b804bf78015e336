"""The page's code is taken from the page and run against a real server with a real worker beside it."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from prefix_store.store import Store
from server.app import create_app
from server.engine.engine import Engine
from server.engine.prefix_loader import PrefixLoader
from server.scheduler.scheduler import Limits
from tests.models import tiny_frozen
from tests.server import loops
from tests.server.over_http import serving
from trainer.worker import Worker

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    where = f"sqlite:///{tmp_path}/store.db"
    store, trainers = Store.open(where), Store.open(where)
    frozen = dataclasses.replace(tiny_frozen("llama"), name="antefix-demo")
    loop = loops.running(Engine(frozen, Limits(1024, 8, 64, 512, 64)))
    app = create_app(store, frozen, loop, PrefixLoader(store.prefixes, frozen, 1 << 20))
    worker = Worker(trainers, tiny_frozen("llama"), "w", say=lambda line: None)
    thread = threading.Thread(target=worker.run, args=(0.05,), daemon=True)
    thread.start()
    with structlog.testing.capture_logs(), serving(app) as found:
        yield found
    worker.stop()
    thread.join()
    trainers.close()


def test_the_python_code(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert ADDRESS in code
    names: dict[str, object] = {}
    try:
        exec(compile(code.replace(ADDRESS, url), "training.md", "exec"), names)
    finally:
        names["client"].close()
    printed = capsys.readouterr().out
    assert "Step 60/60: training loss=" in printed
    assert re.search(r"keeping step \d+", printed)
    assert re.search(r"^succeeded animals@1 \d+$", printed, re.MULTILINE)
    assert names["answer"].prefix["id"] == "animals"
