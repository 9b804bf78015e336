"""For probes and scrapers."""

from __future__ import annotations

from anyio import to_thread
from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from prefix_store.errors import AntefixError
from server.api.services import Services, Serving
from server.metrics import CONTENT_TYPE

router = APIRouter()


@router.get("/healthz")
@router.get("/health")
async def healthy() -> dict[str, str]:
    """The process is up."""
    return {"status": "ok"}


@router.get("/readyz")
async def ready(services: Serving) -> Response:
    """Whether requests can be served. No request arrives before the model is loaded, but its engine may have failed."""
    state = {"model": services.loop.is_alive, "store": await to_thread.run_sync(_store_answers, services)}
    return JSONResponse(state, 200 if all(state.values()) else 503)


@router.get("/metrics")
async def metrics(services: Serving) -> Response:
    """Prometheus's text format."""
    return Response(await to_thread.run_sync(services.metrics.render), headers={"content-type": CONTENT_TYPE})


def _store_answers(services: Services) -> bool:
    try:
        services.store.ping()
    except AntefixError:
        return False
    return True
