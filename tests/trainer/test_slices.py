from __future__ import annotations

from trainer.slices import Sliced, done


def test_all_slices_are_done_and_what_came_of_them_returned():
    taken = []

    def work() -> Sliced[str]:
        for number in range(3):
            taken.append(number)
            yield
        return "whole"

    assert done(work()) == "whole"
    assert taken == [0, 1, 2]
