"""For probes and scrapers."""

from __future__ import annotations

from anyio import to_thread
from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from server.api.services import Serving
from server.metrics import CONTENT_TYPE

router = APIRouter()


@router.get("/healthz")
@router.get("/health")
async def healthy() -> dict[str, str]:
    """The process is up."""
    return {"status": "ok"}


@router.get("/readyz")
async def ready(services: Serving, store: bool = False) -> Response:
    """Whether to send requests here. Without its store a server goes on with what it knows, which is more than none.

    So it stays ready, for else its outage would take every replica away at once; with `store=1` that is 503 too.
    """
    model, answers = services.loop.is_alive, await services.reach.answer() is not None
    if services.loop.has_failed:
        status = "failed"
    elif services.drain.has_begun or not model:
        status = "stopping"
    else:
        status = "ready" if answers else "degraded"
    is_ready = status == "ready" or (status == "degraded" and not store)
    return JSONResponse({"status": status, "model": model, "store": answers}, 200 if is_ready else 503)


@router.get("/metrics")
async def metrics(services: Serving) -> Response:
    """Prometheus's text format."""
    text = await to_thread.run_sync(services.metrics.render, limiter=services.scraping)
    return Response(text, headers={"content-type": CONTENT_TYPE})
