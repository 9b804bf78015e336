"""A small sample of the proof about killed workers, and whether its judge sees what is wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.prove import kill_worker
from tests.prove.stores import at_hand

STEPS = 12
JOB = {
    "status": "succeeded",
    "error": None,
    "digests": ["a"],
    "losses": {"1": [3.0, None], "2": [2.0, 2.5]},
    "taken_up": 1,
    "events": 3,
}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The jobs undisturbed."""
    folder: Path = tmp_path_factory.mktemp("calm")
    return kill_worker.undisturbed(f"sqlite:///{folder}/store.db", STEPS)


def test_a_sample_of_the_kills(calm: dict[str, Any]) -> None:
    kind = "redis" if "redis" in at_hand() else "sqlite"  # where workers may be on several machines
    found = kill_worker.disturbed(kind, 2, STEPS, calm)
    measured = {"kinds": {kind: found}, "steps": STEPS}
    assert kill_worker.missed(measured) == []
    assert (found["kills"], found["jobs"], found["alone"], found["same_bytes"]) == (2, 12, 6, 6)
    assert found["late_writers"] == 6
    assert f"| {kind} | 2 | 12 |" in kill_worker.table(measured)


def judged(label: str, **changes: Any) -> list[str]:
    return kill_worker.judge({label: {f"{label}-0": copy.deepcopy(JOB) | changes}}, {"0": JOB})


def test_the_judge_sees_what_is_wrong() -> None:
    assert judged("alone") == judged("packed") == judged("packed", digests=["b"]) == []
    for changes, words in [
        ({"status": "failed", "error": "worker_lost"}, "ended failed (worker_lost)"),
        ({"digests": ["a", "a"]}, "was published 2 times"),
        ({"losses": {"1": [3.0, None]}}, "told of other steps"),
        ({"losses": {"1": [3.0, None], "2": [2.0, 2.502]}}, "has a loss 2.0e-03 from"),
        ({"losses": {"1": [3.002, None], "2": [2.0, 2.5]}}, "has a loss 2.0e-03 from"),
    ]:
        (wrong,) = judged("packed", **changes)
        assert words in wrong
    (wrong,) = judged("alone", digests=["b"])
    assert "has other bytes" in wrong


def test_other_data_would_show(calm: dict[str, Any]) -> None:
    """The control: the same jobs, each over another's data order, are far from undisturbed."""
    first, last = calm["0"], calm["5"]  # of equal options, but for the seed
    assert kill_worker.furthest(first, last) > 10 * kill_worker.CLOSE
    assert kill_worker.judge({"packed": {"packed-0": last}}, {"0": first}) != []
