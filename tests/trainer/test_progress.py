from itertools import count

from tests.trainer.runs import FROZEN, make
from trainer.progress import Meter, Progress, line, summary
from trainer.step import step
from trainer.tuning import Fit


def test_a_run_that_was_taken_up_again_is_measured_from_there():
    first, again = make(), make()
    for _ in range(10):
        step(FROZEN, [first])
    again.load(first.to_bytes("m"), "m")
    meter = Meter(again, count(0.0, 2.0).__next__)
    waiting = meter.progress(1.5, 2.5)
    assert (waiting.step, waiting.valid_loss) == (10, 2.5)
    assert (waiting.tokens_per_second, waiting.seconds_left) == (None, None), "nothing was trained here yet"
    assert line(waiting).endswith("validation 2.500")
    step(FROZEN, [again])
    progress = meter.progress(1.0, None)
    assert (progress.step, progress.total_steps, progress.seconds_left) == (11, 20, 2.0 * 9)
    assert progress.tokens_per_second == (again.tokens - first.tokens) / 2.0
    assert again.tokens > 2 * (again.tokens - first.tokens), "else this shows nothing"


def test_a_step_reads_well():
    progress = Progress(20, 200, 3.21, None, 0.1, 1234.5, 12.2)
    assert line(progress) == "step 20/200, loss 3.210, 1,234 tokens/s, 12 s left"


def test_the_outcome_reads_well():
    measured = summary(Fit({}, 7, 2.5, 3.0, 3.5))
    assert measured == "keeping step 7: validation loss 3.000 before, 2.500 after, 3.500 without a prefix"
    assert summary(Fit({}, 7, 2.5, 3.0)) == "keeping step 7: validation loss 3.000 before, 2.500 after"
    assert summary(Fit({}, 9, None, None)) == "keeping step 9; too few examples to validate on"
