"""What all tests of the trainer share."""

from __future__ import annotations

import pytest

from trainer import samples


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of jobs that are about something else: writing them out takes longer than to train a tiny model."""
    monkeypatch.setattr(samples, "TOKENS", 4)
