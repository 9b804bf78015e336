from __future__ import annotations

import pytest

from prefix_store.errors import ContextLengthExceeded, InvalidRequest
from prefix_store.jobs import TrainingSpec
from trainer.job_run import find, line, room_for_text, summary
from trainer.loop import Fit, Progress
from trainer.methods import METHODS
from trainer.methods.prompt import SoftPrompt


@pytest.mark.parametrize(("max_length", "virtual_tokens", "room"), [(50, 10, 50), (100, 10, 90), (100, 98, 2)])
def test_an_example_and_the_prefix_share_the_context(max_length, virtual_tokens, room):
    spec = TrainingSpec("0" * 64, 1, max_length=max_length, virtual_tokens=virtual_tokens)
    assert room_for_text(spec, 100) == room


def test_a_prefix_that_fills_the_context_is_refused():
    with pytest.raises(ContextLengthExceeded, match="99 virtual tokens leave no room in a context of 100"):
        room_for_text(TrainingSpec("0" * 64, 1, virtual_tokens=99), 100)


def test_a_method_is_found_by_its_name_and_never_replaced_by_another():
    assert find(METHODS, "prompt") is SoftPrompt
    with pytest.raises(
        InvalidRequest, match="no method 'low_rank', only prefix, prompt; ANTEFIX_METHODS gives it more"
    ):
        find(METHODS, "low_rank")


def test_a_step_reads_well():
    progress = Progress(20, 200, 3.21, None, 0.1, 1234.5, 12.2)
    assert line(progress) == "step 20/200, loss 3.210, 1,234 tokens/s, 12 s left"


def test_the_outcome_reads_well():
    assert summary(Fit({}, 7, 2.5, 3.0)) == "keeping step 7: validation loss 3.000 before, 2.500 after"
    assert summary(Fit({}, 9, None, None)) == "keeping step 9; too few examples to validate on"
