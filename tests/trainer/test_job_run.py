from __future__ import annotations

import pytest

from prefix_store.errors import InvalidRequest
from trainer.job_run import find, line, summary
from trainer.loop import Fit, Progress
from trainer.methods import METHODS
from trainer.methods.prompt import SoftPrompt


def test_a_method_is_found_by_its_name_and_never_replaced_by_another():
    assert find(METHODS, "prompt") is SoftPrompt
    with pytest.raises(
        InvalidRequest, match=r"no method 'low_rank', only prefix, .*prefix_plus; ANTEFIX_METHODS gives it more"
    ):
        find(METHODS, "low_rank")


def test_a_step_reads_well():
    progress = Progress(20, 200, 3.21, None, 0.1, 1234.5, 12.2)
    assert line(progress) == "step 20/200, loss 3.210, 1,234 tokens/s, 12 s left"


def test_the_outcome_reads_well():
    assert summary(Fit({}, 7, 2.5, 3.0)) == "keeping step 7: validation loss 3.000 before, 2.500 after"
    assert summary(Fit({}, 9, None, None)) == "keeping step 9; too few examples to validate on"
