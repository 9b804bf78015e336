"""/v1/model: what a prefix must match to be served here."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.api.services import Serving

router = APIRouter(prefix="/v1/model")


@router.get("")
async def show(services: Serving) -> dict[str, Any]:
    """The frozen model, as far as a prefix can see it. `context_length` counts virtual tokens too."""
    frozen = services.frozen
    return {
        "id": frozen.name,
        "object": "model",
        "geometry": frozen.geometry.to_json(),
        "base_digest": frozen.digest,
        "context_length": frozen.context_length,
    }
