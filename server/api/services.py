"""What the routes work with: made once by `create_app`, found by every handler."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import anyio
from fastapi import Depends, Request

if TYPE_CHECKING:
    from prefix_store.model.frozen import FrozenModel
    from prefix_store.store import Store
    from server.api.auth import Gate
    from server.api.drain import Drain
    from server.api.rates import Rates
    from server.api.reach import Reach
    from server.api.recent import Recent
    from server.engine.grammars import Grammars
    from server.engine.loop import EngineLoop
    from server.engine.prefix_loader import PrefixLoader
    from server.metrics import Metrics


@dataclass(frozen=True)
class Services:
    """The parts of one server.

    `methods`: the ways to tune a prefix that a job may ask for. `clock` is the engine's: deadlines are in its seconds.
    `chat_template` None is the tokenizer's own. `started` is a Unix time, which clients are told as the base model's.
    """

    store: Store
    frozen: FrozenModel
    loop: EngineLoop
    loader: PrefixLoader
    grammars: Grammars
    metrics: Metrics
    gate: Gate
    rates: Rates
    recent: Recent
    drain: Drain
    reach: Reach[None]
    require_prefix: bool
    methods: Sequence[str]
    clock: Callable[[], float]
    chat_template: str | None = None
    started: int = field(default_factory=lambda: int(time.time()))
    # one text at a time: a tokenizer is not made for several threads, and there are few cores
    tokenizing: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))

    # one large body at a time: it takes several times its size while it is read
    reading: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))

    # threads of its own: those that wait for a store that hangs may have taken all others
    scraping: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(2))

    # one at a time: it reads the whole vocabulary, and runs beside the engine
    inspecting: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))

    # one grammar at a time, and of each tenant one that waits for its turn
    compiling: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))
    compiling_of: MutableMapping[str, anyio.Lock] = field(default_factory=weakref.WeakValueDictionary)

    @property
    def has_sliding_window(self) -> bool:
        """Whether any layer sees only the last so many tokens."""
        return self.frozen.has_sliding_window


def services(request: Request) -> Services:
    """The services of the app that serves this request."""
    found: Services = request.app.state.services
    return found


async def _injected(request: Request) -> Services:
    """The same; FastAPI would call a plain function in a thread, which there may be none for while a store hangs."""
    return services(request)


Serving = Annotated[Services, Depends(_injected)]
