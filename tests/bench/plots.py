"""Curves as SVG files beside the results they are drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench import results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes; `curves` by the names in its legend. `logarithmic` in x."""

    x: str
    y: str
    curves: Mapping[str, Curve]
    logarithmic: bool = False


def draw(name: str, panels: Sequence[Panel], columns: int | None = None) -> Path:
    """Writes `docs/results/<name>`, the panels side by side, so many in a row; equal panels give equal bytes."""
    with _style():
        from matplotlib import pyplot, ticker

        columns = columns or len(panels)
        rows = -(-len(panels) // columns)
        figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False)
        for ax, panel in zip(axes.flat, panels, strict=True):
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
        return _saved(figure, name)


def draw_matrix(name: str, values: Sequence[Sequence[float]], names: Sequence[str], what: str) -> Path:
    """Writes `docs/results/<name>`: a square of colours, blue below zero and red above, with names on both sides."""
    with _style():
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 6))
        most = max(abs(value) for row in values for value in row)
        image = axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("prefixes of")
        axes.set_ylabel("rows by")
        figure.colorbar(image, label=what)
        return _saved(figure, name)


def _style() -> AbstractContextManager[None]:
    # it takes a second, and only here is it needed
    import matplotlib

    matplotlib.use("Agg")
    return matplotlib.rc_context(
        {"svg.hashsalt": "antefix", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )


def _saved(figure: Figure, name: str) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    results.FOLDER.mkdir(parents=True, exist_ok=True)
    path = results.FOLDER / name
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
