"""Curves as SVG files beside the results they are drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import results

Curve = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes; `curves` by the names in its legend. `logarithmic` in x."""

    x: str
    y: str
    curves: Mapping[str, Curve]
    logarithmic: bool = False


def draw(name: str, panels: Sequence[Panel]) -> Path:
    """Writes `docs/results/<name>`, the panels side by side; equal panels give equal bytes."""
    # it takes a second, and only here is it needed
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    with matplotlib.rc_context(
        {"svg.hashsalt": "antefix", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
        for ax, panel in zip(axes[0], panels, strict=True):
            for label, (x, y) in panel.curves.items():
                ax.plot(x, y, marker="." if len(x) < 20 else None, label=label)
            if panel.logarithmic:
                ax.set_xscale("log")
                ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                ax.xaxis.set_major_formatter("{x:g}")
                ax.xaxis.set_minor_formatter("")
            ax.set_xlabel(panel.x)
            ax.set_ylabel(panel.y)
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
        figure.tight_layout()
        results.FOLDER.mkdir(parents=True, exist_ok=True)
        path = results.FOLDER / name
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
    return path
