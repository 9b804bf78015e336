"""How a job's failure is told to its owner."""

from __future__ import annotations

import traceback

from prefix_store.errors import AntefixError
from prefix_store.jobs import JobError
from prefix_store.model import shortage
from trainer.job_run import NoImprovement
from trainer.memory import TooLarge

FAILURES: dict[type[Exception], str] = {
    FloatingPointError: "training_diverged",
    NoImprovement: "no_improvement",
    TooLarge: "out_of_memory",
}
OUT_OF_MEMORY = "a step took more memory than there is; a smaller batch_size or max_length takes less"


def explain(error: Exception) -> JobError:
    """A failure as its job records it; what nobody foresaw is also printed in full."""
    if isinstance(error, AntefixError):
        return JobError(error.code, error.message)
    if shortage.ran_out(error):
        return JobError("out_of_memory", f"{OUT_OF_MEMORY} ({str(error)[:300] or type(error).__name__})")
    for kind, code in FAILURES.items():
        if isinstance(error, kind):
            return JobError(code, str(error)[:500] or code)
    traceback.print_exception(error)
    return JobError("training_failed", f"{type(error).__name__}: {error}"[:500])
