from __future__ import annotations

import pytest

from server.engine.budget import GIB, MARGIN, Budget


def budget(free: int, step: int = 2 * GIB) -> Budget:
    return Budget(total=80 * GIB, free=free, model=14 * GIB, step=step, slot=512 << 10)


def test_the_pool_gets_what_the_model_a_step_and_the_margin_leave() -> None:
    found = budget(free=66 * GIB)
    assert found.margin == MARGIN * 80 * GIB == 4 * GIB
    assert found.pool == (66 - 2 - 4) * GIB
    assert found.slots == 60 * 2048
    assert found.line(found.slots) == ("device memory: model 14.0 GiB, a step 2.0 GiB, pool 60.0 GiB = 122880 slots")


@pytest.mark.parametrize("free", [0, GIB, 6 * GIB, 6 * GIB + 1])
def test_less_than_a_step_and_the_margin_is_no_pool_at_all(free: int) -> None:
    assert budget(free).slots == 0


def test_a_larger_step_takes_slots_and_a_part_of_one_is_none() -> None:
    assert budget(66 * GIB).slots - budget(66 * GIB, step=3 * GIB).slots == 2048
    assert budget(66 * GIB - 1).slots == 60 * 2048 - 1


def test_why_there_are_not_more_is_said_in_full() -> None:
    assert budget(66 * GIB).shortage() == (
        "66.0 GiB of the device's 80.0 GiB are free beside the model; a step takes up to 2.0 GiB, 4.0 GiB stay free, "
        "and 60.0 GiB hold 122880 slots"
    )
