"""What the record says, as tables in Markdown for the page that shows it."""

from __future__ import annotations

from typing import Any

SECTION = "gpu"
UNMEASURED = "Not measured yet: no GPU has run this.\n"


def table(measured: dict[str, Any]) -> str:
    """The goals, what decoding takes, and what did not run or was wrong."""
    lines = ["| random weights, bfloat16 | measured | goal |", "|---|---|---|"]
    for name, goal in measured["goals"].items():
        lines.append(
            f"| {name} | {goal['measured']:.3g} | {goal['goal']} |" if goal else f"| {name} | not measured | |"
        )
    lines += ["", "| decoding | tokens/s | ms a step | of the bytes-moved ideal |", "|---|---|---|---|"]
    for piece, name, found in _results(measured):
        if "share_of_ideal" in found:
            rates = f"{found['tokens_per_second']:,.0f} | {found['ms_a_step']:.2f} | {found['share_of_ideal']:.0%}"
            lines.append(f"| {piece.partition(': ')[2]}, {name} | {rates} |")
    checks = [found["passed"] for _, _, found in _results(measured) if "passed" in found]
    lines += ["", f"{sum(checks)} of {len(checks)} checks passed."]
    lines += [f"- {piece}, {name}: {found['failed']}" for piece, name, found in _results(measured) if "failed" in found]
    for piece, held in measured["pieces"].items():
        lines += [f"- {piece}: {held[why]}" for why in ("failed", "left_out") if why in held]
    return "\n".join(lines)


def _results(measured: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (piece, name, found) for piece, held in measured["pieces"].items() for name, found in held["results"].items()
    ]
