"""A job's report as a picture, drawn here from its JSON; matplotlib is an extra, `antefix[plot]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefix_store.cli.client import NOT_ANTEFIX, Failure, fail

INCHES = 8.0, 4.5


def check_installed() -> None:
    """Ends the command, with how to install it, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        fail("matplotlib is not installed: pip install 'antefix[plot]', or leave --png out")


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes a PNG of the losses, and of the learning rate beside them. Raises Failure."""
    from matplotlib.figure import Figure

    figure = Figure(INCHES, layout="constrained")
    losses = figure.add_subplot()
    try:
        for name, label, style in (("train_loss", "training", "-"), ("valid_loss", "validation", "o-")):
            points = [(point["step"], point[name]) for point in report["curve"] if point[name] is not None]
            if points:
                losses.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
        rates = losses.twinx()
        steps = [point["step"] for point in report["curve"]]
        rates.plot(steps, [point["learning_rate"] for point in report["curve"]], ":", color="grey", linewidth=1)
        job = report["job"]
        losses.set_title(f"{job['prefix_id']}  {job['id']}  {job['status']}", parse_math=False)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise Failure(f"{NOT_ANTEFIX}: {error}") from error
    losses.set_xlabel("step")
    losses.set_ylabel("nats per token")
    rates.set_ylabel("learning rate")
    if losses.lines:
        losses.legend(loc="upper right")
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")
