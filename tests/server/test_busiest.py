from __future__ import annotations

from server.busiest import OTHER, PERIOD_SECONDS, Busiest


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def counted(busiest: Busiest) -> dict[str, int]:
    return {name: tokens["a"] for name, tokens in busiest.totals().items()}


def test_the_first_get_a_name_and_the_rest_is_other():
    busiest = Busiest(("a", "b"), most=2)
    for tenant in ("x", "y", "z", "x", "w"):
        busiest.count(tenant, "a", 10)
    busiest.count("x", "b", 3)
    assert busiest.totals() == {OTHER: {"a": 20, "b": 0}, "x": {"a": 20, "b": 3}, "y": {"a": 10, "b": 0}}


def test_a_name_goes_to_who_does_more_by_far_and_no_number_falls():
    clock = Clock()
    busiest = Busiest(("a",), most=2, clock=clock)
    for tenant, tokens in {"x": 100, "y": 10, "z": 41, "w": 40}.items():
        busiest.count(tenant, "a", tokens)
    before = counted(busiest)
    clock.now += PERIOD_SECONDS
    busiest.count("z", "a", 1)
    after = counted(busiest)
    assert after == {OTHER: 81, "x": 100, "z": 1}, "z did more than four times as much as y; w did not"
    assert after[OTHER] == before[OTHER]


def test_what_was_done_long_ago_keeps_no_name():
    clock = Clock()
    busiest = Busiest(("a",), most=1, clock=clock)
    busiest.count("x", "a", 1000)
    for period in range(12):
        busiest.count("y", "a", 100)
        clock.now += PERIOD_SECONDS
        if period == 0:
            busiest.count("y", "a", 100)
            assert "x" in counted(busiest), "until now it was the busiest"
    assert counted(busiest).keys() == {OTHER, "y"}


def test_a_tenant_that_is_called_other_is_counted_there():
    clock = Clock()
    busiest = Busiest(("a",), most=1, clock=clock)
    busiest.count(OTHER, "a", 10)
    busiest.count("x", "a", 1)
    clock.now += PERIOD_SECONDS
    busiest.count("x", "a", 1)
    assert counted(busiest) == {OTHER: 10, "x": 2}


def test_numbers_of_tenants_without_a_name_are_one():
    busiest = Busiest(("a",), most=1)
    busiest.count("x", "a", 1)
    assert busiest.fold({"y": 2, "z": 3}) == {OTHER: 5, "x": 0}
    assert busiest.fold({"x": 2, OTHER: 1}) == {OTHER: 1, "x": 2}
