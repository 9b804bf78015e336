from __future__ import annotations

from prefix_store import job_report
from prefix_store.jobs import JobEvent

NOTHING = dict.fromkeys(job_report.CURVES)


def history(*told):
    return [JobEvent("ftjob-a", number, 0.0, kind, data) for number, (kind, data) in enumerate(told, start=1)]


def step(number, train=1.0, valid=None):
    return "metrics", {"step": number, "total_steps": 9, "train_loss": train, "valid_loss": valid, "learning_rate": 0.1}


def test_nothing_recorded_is_an_empty_report():
    assert job_report.make([]) == {"chosen": {}, "curve": [], "best": None, "samples": [], "messages": []}


def test_a_report_holds_the_curves_the_choices_and_the_samples():
    samples = [{"prompt": "a", "expected": "b", "before": "c", "after": "d"}]
    report = job_report.make(
        history(
            ("message", {"message": "training", "chosen": {"steps": 9}}),
            step(1, 3.0),
            step(2, 2.0, 2.5),
            step(3, 1.0, 2.25),
            step(4, 0.5, 2.75),
            ("message", {"message": "keeping step 3"}),
            ("samples", {"samples": samples}),
        )
    )
    assert [(point["step"], point["train_loss"], point["valid_loss"]) for point in report["curve"]] == [
        (1, 3.0, None), (2, 2.0, 2.5), (3, 1.0, 2.25), (4, 0.5, 2.75)
    ]  # fmt: skip
    assert report["best"] == {**NOTHING, "step": 3, "train_loss": 1.0, "valid_loss": 2.25, "learning_rate": 0.1}
    assert (report["chosen"], report["samples"]) == ({"steps": 9}, samples)
    assert report["messages"] == ["training", "keeping step 3"]


def test_steps_that_were_taken_again_count_as_they_were_last():
    report = job_report.make(history(step(1, 1.0), step(2, 2.0, 0.1), step(3, 3.0), step(2, 2.5, 0.2), step(4, 4.0)))
    assert [point["train_loss"] for point in report["curve"]] == [1.0, 2.5, 4.0]
    assert report["best"]["valid_loss"] == 0.2


def test_what_a_later_worker_records_beside_is_passed_over():
    assert job_report.make(history(("weather", {"wind": "north"}), step(1)))["curve"][0]["step"] == 1
