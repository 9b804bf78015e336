"""Shared fixtures; collects the parity tests' worst differences and prints them at the end."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

_WORST = "worst logit difference"

# Read when Triton is imported, which transformers does where there is one, for other folders' fixtures already.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    # tiny models only: a second thread would cost more in barriers than it saves
    torch.set_num_threads(1)
    # servers that tests start share the cores with other tests: threads that wait for one another shall sleep
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # files go to workers whole: the long ones first, so that no worker is left alone with one at the end
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture
def record_worst(record_property: Callable[[str, object], None]) -> Callable[[str, float], None]:
    """Notes the largest logit difference that a test saw for a family."""
    return lambda family, difference: record_property(_WORST, (family, difference))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    worst: dict[str, float] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == _WORST:
                worst[value[0]] = max(value[1], worst.get(value[0], 0.0))
    if worst:
        terminalreporter.section("worst logit difference against transformers, float32")
        for family, difference in worst.items():
            terminalreporter.write_line(f"{family:<20} {difference:.1e}")
