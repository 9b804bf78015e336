from __future__ import annotations

import json
from itertools import chain, count
from pathlib import Path

import pytest
import torch

from prefix_store.errors import ModelUnsupported
from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply, frozen
from tests.judging import nats_per_token
from tests.models import tiny_frozen, tiny_tokenizer
from trainer import data, schedule
from trainer.loop import fit
from trainer.methods.prefix import DirectKV
from trainer.progress import Progress
from trainer.tuning import Fit

SHARED = Path(__file__).parents[3] / "shared"
FROZEN = apply.attach(tiny_frozen("llama"))
EXAMPLES = data.tokenize(
    tiny_tokenizer(), [{"prompt": f"{number} is", "completion": " a number"} for number in range(12)], 32
)


def make(**options) -> tuple[DirectKV, TrainingSpec]:
    spec = TrainingSpec(
        "0" * 64, len(EXAMPLES), **{"virtual_tokens": 4, "steps": 20, "batch_size": 4, "learning_rate": 0.3, **options}
    )
    return DirectKV(FROZEN, spec, chain.from_iterable(example.ids for example in EXAMPLES)), spec


def run(**options) -> Fit:
    method, spec = make(**options)
    return fit(FROZEN, method, EXAMPLES, spec)


def test_training_lowers_the_loss_and_leaves_the_model_alone():
    before = {name: value.clone() for name, value in FROZEN.model.state_dict().items()}
    method, spec = make()

    def validate() -> float:
        return nats_per_token(FROZEN, method.rows, data.batches(EXAMPLES, 12))

    result = fit(FROZEN, method, EXAMPLES, spec, validate=validate)
    assert result.valid_loss < result.start_loss - 1.0  # observed: 6.6 to 2.3
    assert all(torch.equal(value, before[name]) for name, value in FROZEN.model.state_dict().items())
    assert all(parameter.grad is None for parameter in FROZEN.model.parameters())


@pytest.mark.skipif(not SHARED.is_dir(), reason="the trained models and texts in ../shared are not here")
def test_a_trained_model_learns_an_author_at_the_default_rate():
    model = apply.attach(frozen.load(SHARED / "models" / "stories260K"))
    lines = (SHARED / "data" / "authors" / "lewis_carroll" / "train.jsonl").read_text().splitlines()[:60]
    learned, judged = data.split(data.tokenize(model.tokenizer, [json.loads(line) for line in lines], 64), seed=0)
    spec = TrainingSpec("0" * 64, len(lines), virtual_tokens=8, steps=30)
    method = DirectKV(model, spec, chain.from_iterable(example.ids for example in learned))

    def validate() -> float:
        return nats_per_token(model, method.rows, data.batches(judged, 8))

    result = fit(model, method, learned, spec, validate=validate)
    assert result.valid_loss < result.start_loss - 0.2, result


def test_equal_seeds_give_equal_bits():
    first, again, other = (run(seed=seed).tensors["self.kv"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_best_by_validation_is_kept():
    method, spec = make()
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.0, *[4.0] * 6])
    seen = {}

    def remember(progress: Progress) -> None:
        seen[progress.step] = method.tensors()["self.kv"]

    result = fit(FROZEN, method, EXAMPLES, spec, validate=lambda: next(losses), on_progress=remember)
    assert (result.step, result.valid_loss, result.start_loss) == (4, 3.0, 5.0)
    assert torch.equal(result.tensors["self.kv"], seen[4])
    assert next(losses, None) is None, "validated at the start and ten times"


def test_training_that_only_harms_keeps_the_start():
    method, spec = make()
    start = method.tensors()["self.kv"]
    result = fit(FROZEN, method, EXAMPLES, spec, validate=count(1.0).__next__)
    assert result.step == 0
    assert torch.equal(result.tensors["self.kv"], start)


def test_decay_leads_back_to_the_start():
    def distance(**options) -> float:
        method, spec = make(**options)
        start = method.kv().detach()
        fit(FROZEN, method, EXAMPLES, spec)
        return (method.kv() - start).norm().item()

    assert distance(weight_decay=2.0) < 0.6 * distance()  # decay towards 0 would have led away from here


def test_the_schedule_is_the_job_s():
    rates: dict[str, list[float]] = {}
    for kind in ("linear", "cosine"):
        method, spec = make(steps=8, schedule=kind, warmup=0.5)
        heard: list[Progress] = []
        fit(FROZEN, method, EXAMPLES, spec, on_progress=heard.append)
        rates[kind] = [progress.learning_rate for progress in heard]
        assert rates[kind] == [0.3 * schedule.share(kind, step, 8, 0.5) for step in range(1, 9)]
    assert rates["linear"] != rates["cosine"]


def test_without_validation_the_last_is_kept():
    method, spec = make()
    result = fit(FROZEN, method, EXAMPLES, spec)
    assert (result.step, result.valid_loss) == (spec.steps, None)
    assert torch.equal(result.tensors["self.kv"], method.tensors()["self.kv"])


def test_progress_tells_of_every_step():
    method, spec = make(steps=4, batch_size=2)
    heard: list[Progress] = []
    fit(FROZEN, method, EXAMPLES[:1] * 2, spec, on_progress=heard.append, clock=count(0.0, 2.0).__next__)
    assert [progress.step for progress in heard] == [1, 2, 3, 4]
    assert [progress.seconds_left for progress in heard] == [6.0, 4.0, 2.0, 0.0]
    assert {progress.tokens_per_second for progress in heard} == {2 * len(EXAMPLES[0].ids) / 2.0}
    rates = [0.3 * schedule.share("linear", step, 4, 0.05) for step in (1, 2, 3, 4)]
    assert [progress.learning_rate for progress in heard] == rates


def test_progress_may_stop_the_run():
    method, spec = make()
    heard: list[int] = []

    def stop_at_three(progress: Progress) -> None:
        heard.append(progress.step)
        if progress.step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(FROZEN, method, EXAMPLES, spec, on_progress=stop_at_three)
    assert heard == [1, 2, 3]


def test_a_layer_without_gradient_ends_the_run(monkeypatch):
    method, spec = make()
    monkeypatch.setattr(method, "layers_without_gradient", lambda: [1])
    with pytest.raises(ModelUnsupported, match=r"layers \[1\]"):
        fit(FROZEN, method, EXAMPLES, spec)


@pytest.mark.parametrize("broken", ["training", "validation"])
def test_a_loss_that_is_no_number_ends_the_run(broken):
    method, spec = make()
    if broken == "training":
        method.delta.data[:] = float("nan")
    validate = (lambda: float("nan")) if broken == "validation" else None
    with pytest.raises(FloatingPointError, match=f"{broken} loss became nan"):
        fit(FROZEN, method, EXAMPLES, spec, validate=validate)
