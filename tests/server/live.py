"""A whole server around a real engine over a tiny model, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from starlette.testclient import TestClient

from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from server.app import create_app
from server.engine.engine import Engine
from server.engine.prefix_loader import PrefixLoader
from server.scheduler.scheduler import Limits
from tests.models import tiny_frozen
from tests.server import loops

LIMITS = Limits(slots=4096, rows=32, step_tokens=64, context_length=512, waiting=100)


@dataclass(frozen=True)
class Live:
    """`frozen` is the model that the engine has taken over."""

    client: TestClient
    engine: Engine
    frozen: FrozenModel

    def publish(self, name: str, file: bytes) -> None:
        """Uploads a native file."""
        reply = self.client.post("/v1/prefixes", data={"id": name}, files={"file": ("f", file)})
        assert reply.status_code == 201, reply.text


@contextmanager
def serving(
    store: Store, family: str = "llama", dtype: torch.dtype = torch.float32, limits: Limits = LIMITS, **options: object
) -> Iterator[Live]:
    """Runs until the block ends; `options` are `create_app`'s."""
    frozen = tiny_frozen(family)
    frozen.model.to(torch.bfloat16 if dtype is torch.int8 else dtype)
    engine = Engine(frozen, limits, int8=dtype is torch.int8)
    loop = loops.running(engine)
    app = create_app(store, frozen, loop, PrefixLoader(store.prefixes, frozen, 1 << 24), **options)
    try:
        yield Live(TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False), engine, frozen)
    finally:
        loop.stop()
