from __future__ import annotations

import pytest

from server.distribution import Distribution, powers_of_two


def test_a_number_counts_under_the_first_bound_that_it_does_not_exceed():
    counted = Distribution((1, 2, 4))
    for number in (0, 1, 1.5, 4, 5):
        counted.add(number)
    counted.add(3, times=2)
    found = counted.read()
    assert found.counts == (2, 3, 6, 7), "each with all before it, and all of them last"
    assert found.total == pytest.approx(17.5)


def test_powers_of_two_begin_with_nothing():
    assert powers_of_two(8) == (0, 1, 2, 4, 8)
    assert powers_of_two(9) == (0, 1, 2, 4, 8)
