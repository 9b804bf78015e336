"""How a training job went, made wholly from the history that its worker recorded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prefix_store.jobs import JobEvent

CURVES = ("step", "train_loss", "valid_loss", "learning_rate", "tokens_per_second")


def make(events: Iterable[JobEvent]) -> dict[str, Any]:
    """`{chosen, curve, best, samples, messages}` from a job's events, oldest first.

    `chosen`: options that the worker chose by the data. `curve`: points in order of step, each `{step, train_loss,
    valid_loss, learning_rate, tokens_per_second}`; of steps that were taken again, as after a crash, the last.
    `best`: the point with the lowest validation loss, if any has one. `samples`: `{prompt, expected, before, after}`.
    """
    curve: list[dict[str, Any]] = []
    chosen: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    messages: list[str] = []
    for event in events:
        if event.kind == "metrics":
            while curve and curve[-1]["step"] >= event.data["step"]:
                curve.pop()
            curve.append({name: event.data.get(name) for name in CURVES})
        elif event.kind == "samples":
            samples = event.data["samples"]
        elif event.kind == "message":
            messages.append(event.data["message"])
            chosen = event.data.get("chosen", chosen)
    judged = [point for point in curve if point["valid_loss"] is not None]
    best = min(judged, key=lambda point: point["valid_loss"], default=None)
    return {"chosen": chosen, "curve": curve, "best": best, "samples": samples, "messages": messages}
