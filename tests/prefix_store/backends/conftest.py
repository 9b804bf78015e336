"""The backends' contracts hold for every kind alike."""

from __future__ import annotations

import pytest

from tests.prefix_store.conftest import KINDS


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name
