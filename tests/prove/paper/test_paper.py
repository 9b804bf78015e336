"""The comparison's plumbing: its arithmetic, and one tiny run of a rival and of a prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefix_store.jobs import TrainingSpec
from tests.models import tiny_frozen
from tests.prove.bundled import DATA
from tests.prove.paper import baselines, comparison, runs, weight, written
from tests.prove.paper.tasks import UNSEEN, Task, scores
from trainer.data import Example

EXAMPLES = [Example((0, 5, 6, 7, 8, 1), 2), Example((0, 9, 4), 2), Example((0, 3, 3, 9), 1)]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # between PEFT and transformers
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the texts in {DATA}")


def test_adapters_change_nothing_at_first_and_nothing_else_is_trained() -> None:
    plain, frozen = tiny_frozen("llama").model, tiny_frozen("llama").model
    ids = torch.tensor([[0, 5, 6, 7]])
    before = plain(ids).logits
    adapted = baselines.baselines(4)["adapters 3 %"].prepare(frozen)
    assert torch.equal(adapted(ids).logits, before)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".down." in name or ".up." in name for name in trained)


@pytest.mark.parametrize("name", baselines.baselines(4))
def test_every_rival_learns_and_keeps_its_best(name: str) -> None:
    model = baselines.baselines(4)[name].prepare(tiny_frozen("llama").model)
    before = baselines.nats(model, EXAMPLES)
    found = baselines.train(model, EXAMPLES, EXAMPLES, rate=0.01, steps=12, seed=0)
    assert found["loss"] < before
    assert baselines.nats(model, EXAMPLES) == pytest.approx(found["loss"], abs=1e-5)


def test_the_mean_is_over_seeds_with_its_standard_error() -> None:
    several: list[dict[str, Any]] = [{"bleu": bleu, "loss": 2.0, "peak_mb": 9, "samples": []} for bleu in (1, 2, 3)]
    found = comparison.mean(several)
    assert (found["bleu"], found["loss"], found["seeds"]) == (2.0, 2.0, 3)
    assert found["bleu_error"] == pytest.approx(1 / 3**0.5)
    assert "peak_mb" not in found


def test_goals_are_missed_by_more_than_the_seeds_scatter() -> None:
    def arms(prefix: float, plus: float) -> dict[str, Any]:
        bleu = {"prefix": prefix, "prefix_mlp": 1, "PEFT prefix": 40, "PEFT prefix, MLP": 2, "LoRA": 50}
        bleu |= {"prefix_plus": plus, "fine-tuning": 30}
        return {name: {"bleu": value, "bleu_error": 0.5} for name, value in bleu.items()}

    labels = [task.label for task in (*comparison.TASKS, comparison.UNSEEN)]
    assert comparison.missed({"tasks": {label: arms(41, 49.5) for label in labels}}) == []
    assert comparison.missed({"tasks": {label: arms(39.5, 48.5) for label in labels}}) == []
    assert len(comparison.missed({"tasks": {label: arms(29, 40) for label in labels}})) == 5


def test_prompts_are_written_around_the_data() -> None:
    rows = [{"prompt": "a : b", "completion": "B is a."}]
    assert written.instructed(rows, "Say {prompt}!") == ["Say a : b!"]
    assert written.with_shots(rows, rows, lambda text: True) == ["a : b\nB is a.\n\na : b\n"]


def test_of_too_many_examples_the_last_that_fit_stand_before_the_data() -> None:
    shots = [{"prompt": f"{n}", "completion": f"is {n}"} for n in range(4)]
    for most, kept in ((100, [0, 1, 2, 3]), (18, [2, 3]), (4, [])):
        (text,) = written.with_shots([{"prompt": "x"}], shots, lambda text, most=most: len(text) <= most)
        assert text == "".join(f"{n}\nis {n}\n\n" for n in kept) + "x\n"
    assert written.first_line("\n  B is a. \nmore") == "B is a."
    assert written.first_line(" \n") == ""


def test_scores_know_a_perfect_answer() -> None:
    found = scores(["the cat sat on the mat"], [["a dog", "the cat sat on the mat"]])
    assert [round(found[name]) for name in ("bleu", "rouge_l", "chrf")] == [100, 100, 100]


@real
def test_tasks_are_fixed_and_unseen_topics_are_not_trained_on() -> None:
    task = Task("webnlg", unseen=True)
    assert not {row["category"] for row in task.train(0) + task.dev()} & set(UNSEEN)
    assert {row["category"] for row in task.test()} <= set(UNSEEN)
    few = Task("e2e", 50)
    assert few.train(1) == few.train(1) != few.train(2)
    assert [len(few.train(1)), len(few.dev()), len(Task("e2e").train(0))] == [50, 50, 4000]


@real
@pytest.mark.parametrize("arm", ["LoRA", "prefix_plus", "shots 1"])
def test_a_run_tells_what_it_took(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.prove.paper.tasks.TEST", 3)
    monkeypatch.setattr("tests.prove.paper.tasks.DEV", 4)
    task = {"name": "e2e", "few": 8, "unseen": False}
    found = runs.measure({"task": task, "arm": arm, "rate": 0.01, "seed": 0, "steps": 2})
    assert {"bleu", "rouge_l", "chrf", "trainable", "bytes", "peak_mb", "tokens_per_second"} <= set(found)
    assert (found["trainable"] > 0) == (arm != "shots 1")


@real
@pytest.mark.parametrize(
    ("arm", "options"), [("prefix", {"virtual_tokens": 3}), ("prefix_plus", {"feature_map": "gelu"})]
)
def test_an_ablation_is_asked_where_attention_goes(
    arm: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.prove.paper.tasks.TEST", 12)
    monkeypatch.setattr("tests.prove.paper.tasks.DEV", 4)
    task = {"name": "e2e", "few": 8, "unseen": False}
    found = runs.measure({"task": task, "arm": arm, "rate": 0.1, "seed": 0, "steps": 2, "options": options})
    weights = list(found["weight"].values())
    assert len(weights) == len(weight.LENGTHS)
    assert all(0 < value < 1 for value in weights)
    if arm == "prefix":
        assert weights[0] > weights[-1]  # a longer prompt takes attention from the prefix


def test_every_ablation_is_a_run_that_can_be_made_and_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(comparison.plots, "draw", lambda name, panels: drawn.append((name, panels)))
    run = {"loss": 1.0, "weight": {"8": 0.5, "16": 0.25}}
    comparison.plot({"ablations": dict.fromkeys(comparison.ABLATIONS, run)})
    ((name, panels),) = drawn
    assert name == "paper.svg"
    assert [len(panel.curves) for panel in panels] == [8, 7]
    for arm, options in comparison.ABLATIONS.values():
        TrainingSpec(data_digest="", examples=8, method=arm, **{"virtual_tokens": 0} | options)
