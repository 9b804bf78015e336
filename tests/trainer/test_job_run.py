from __future__ import annotations

import pytest

from prefix_store.errors import InvalidRequest
from trainer.job_run import find
from trainer.methods import METHODS
from trainer.methods.prompt import SoftPrompt


def test_a_method_is_found_by_its_name_and_never_replaced_by_another():
    assert find(METHODS, "prompt") is SoftPrompt
    with pytest.raises(
        InvalidRequest, match=r"no method 'low_rank', only prefix, .*prefix_plus; ANTEFIX_METHODS gives it more"
    ):
        find(METHODS, "low_rank")
