"""A small sample of the proof about killed workers, and whether its judge sees what is wrong."""

from __future__ import annotations

import copy
from typing import Any

from prefix_store.store import Store
from tests.prove import kill_worker
from tests.prove.stores import at_hand

JOB = {
    "status": "succeeded",
    "error": None,
    "digests": ["a"],
    "losses": {"1": [3.0, None], "2": [2.0, 2.5]},
    "taken_up": 1,
    "events": 3,
}


def test_a_sample_of_the_kills() -> None:
    kind = "redis" if "redis" in at_hand() else "sqlite"  # where workers may be on several machines
    measured = kill_worker.run(kills=2, kinds=[kind], steps=16)
    assert kill_worker.missed(measured) == []
    found = measured["kinds"][kind]
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


def test_other_data_would_show(tmp_path: Any) -> None:
    """The control: the same jobs, each over another's data order, are far from undisturbed."""
    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    found = kill_worker._undisturbed(f"sqlite:///{tmp_path}/store.db", 10)
    first, last = found["0"], found["5"]  # of equal options, but for the seed
    assert kill_worker.furthest(first, last) > 10 * kill_worker.CLOSE
    assert kill_worker.judge({"packed": {"packed-0": last}}, {"0": first}) != []
    store.close()
