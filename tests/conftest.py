"""Shared fixtures; collects the parity tests' worst differences and prints them at the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

_WORST: dict[str, float] = {}


def pytest_configure() -> None:
    # tiny models only: a second thread would cost more in barriers than it saves
    torch.set_num_threads(1)


@pytest.fixture
def record_worst() -> Callable[[str, float], None]:
    """Remembers the largest logit difference seen for a family."""

    def record(family: str, difference: float) -> None:
        _WORST[family] = max(difference, _WORST.get(family, 0.0))

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _WORST:
        terminalreporter.section("worst logit difference against transformers, float32")
        for family, difference in _WORST.items():
            terminalreporter.write_line(f"{family:<14} {difference:.1e}")
