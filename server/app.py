"""The application: everything it works with comes in as arguments, nothing is global."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI

from prefix_store.jobs import BUILT_IN_METHODS
from prefix_store.model.frozen import FrozenModel
from prefix_store.store import REDIS_SCHEMES, Store
from server.api import (
    chat,
    completions,
    errors,
    files,
    fine_tuning,
    generate,
    inspect,
    model,
    models,
    openapi,
    ops,
    prefixes,
    residency,
    tokens,
    training,
    uploads,
    verify,
    versions,
)  # fmt: skip
from server.api.auth import Gate, authorise
from server.api.drain import Drain, Draining
from server.api.exchange import Exchange
from server.api.limits import MB, BodyLimit
from server.api.rates import Rates, counters
from server.api.reach import Reach
from server.api.recent import Recent
from server.api.services import Services
from server.collector import COLLECT_SECONDS, PATIENCE_SECONDS, Collector
from server.engine.grammars import Grammars
from server.engine.loop import EngineLoop
from server.engine.prefix_loader import PrefixLoader
from server.exposition import StoreNumbers
from server.metrics import Metrics
from server.scheduler.messages import FinishReason


def create_app(
    store: Store,
    frozen: FrozenModel,
    loop: EngineLoop,
    loader: PrefixLoader,
    *,
    is_loopback: bool = True,
    require_prefix: bool = False,
    methods: Sequence[str] = BUILT_IN_METHODS,
    max_upload_mb: int = 256,
    counters_url: str | None = None,
    collect_seconds: float = COLLECT_SECONDS,
    chat_template: str | None = None,
    drain: Drain | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """Joins the parts of a server. The loop must run; it is stopped, and the store closed, when the app shuts down.

    `methods` names the ways to tune a prefix that a job may ask for. `counters_url`: the store's address, where rates
    are counted if it is a Redis. `chat_template` stands in for the tokenizer's own. `drain` is begun by whoever stops
    the server. `clock` is the one that the engine reads deadlines by.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        collector = Collector(store, collect_seconds)
        collector.start()
        yield
        loop.stop()
        grammars.close()
        collector.stop()
        store.close()
        collector.join(PATIENCE_SECONDS)

    # FastAPI's own pages would be served without asking for a key
    app = FastAPI(
        title="antefix",
        lifespan=lifespan,
        dependencies=[Depends(authorise)],
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    drain = drain or Drain()
    grammars = Grammars(frozen)
    numbers = Reach(lambda: _numbers(store))
    metrics = Metrics(loop.stats, loader.stats, lambda: (numbers.wait() or (None,))[0], clock)
    for reason in FinishReason:  # a counter that begins at nothing is one whose first step is seen
        metrics.finished.labels(reason)
    recent = Recent(lambda what: metrics.from_memory.labels(what).inc())
    gate = Gate(store.keys, recent, is_loopback=is_loopback)
    counts_in_store = counters_url is not None and counters_url.startswith(REDIS_SCHEMES)
    rates = Rates(
        lambda tenant: recent.ask("quotas", tenant, lambda: store.tenants.quotas(tenant)),
        counters(counters_url),
        clock,
        lambda: counts_in_store and recent.is_away,
    )
    app.state.services = Services(
        store,
        frozen,
        loop,
        loader,
        grammars,
        metrics,
        gate,
        rates,
        recent,
        drain,
        Reach(store.ping),
        require_prefix,
        methods,
        clock,
        chat_template,
    )
    errors.install(app)
    app.add_middleware(BodyLimit, upload_bytes=max_upload_mb * MB, metrics=metrics)
    app.add_middleware(Draining, drain=drain, metrics=metrics)
    app.add_middleware(Exchange, metrics=metrics)
    parts = (
        *(ops, openapi, model, generate, completions, chat, models, tokens, training, files, fine_tuning),
        *(uploads, versions, inspect, verify, residency),
    )
    # `prefixes` last: a reference may hold a slash, so its route for one prefix takes any path below it
    for part in (*parts, prefixes):
        app.include_router(part.router)
    return app


def _numbers(store: Store) -> StoreNumbers:
    """Raises StoreUnavailable, also where only the blobs are away."""
    store.blobs.ping()
    return StoreNumbers(store.jobs.job_counts(), store.jobs.overdue(), store.blobs.free_bytes())
