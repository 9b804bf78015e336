import pytest

from tests.trainer.runs import EXAMPLES, FROZEN, make
from trainer import data
from trainer.evaluate import nats_per_token
from trainer.step import score
from trainer.validation import Validation


@pytest.mark.parametrize("size", [1, 5, 12, 50])
def test_slices_of_any_size_add_up_to_the_whole(size):
    method = make().method
    for rows in (None, method.rows):
        validation, slices = Validation(EXAMPLES, size, rows), 0
        while not validation.done:
            validation.add(*score(FROZEN, [validation]))
            slices += 1
        assert slices == -(-len(EXAMPLES) // size)
        assert validation.is_bare == (rows is None)
        assert validation.loss == pytest.approx(nats_per_token(FROZEN, rows, data.batches(EXAMPLES, 4)), abs=1e-5)
