"""What a number is meant to be. A goal is printed beside what was measured; missing one is news, not an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Goal = dict[str, Any]


def at_least(measured: float, goal: float, unit: str = "") -> Goal:
    """The more the better."""
    return {"measured": round(measured, 3), "goal": f"≥ {goal:g}", "unit": unit, "met": measured >= goal}


def at_most(measured: float, goal: float, unit: str = "") -> Goal:
    """The less the better."""
    return {"measured": round(measured, 3), "goal": f"≤ {goal:g}", "unit": unit, "met": measured <= goal}


def table(title: str, goals: Mapping[str, Goal]) -> str:
    """The goals as a table in Markdown."""
    lines = [f"| {title} | measured | goal |", "|---|---|---|"]
    for name, goal in goals.items():
        lines.append(f"| {name} | {goal['measured']:.3g} {goal['unit']} | {goal['goal']} {goal['unit']} |")
    return "\n".join(line.replace("  ", " ") for line in lines)
