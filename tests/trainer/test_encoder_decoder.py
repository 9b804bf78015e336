"""Prefixes for encoder-decoder models, from a job to what is published."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from prefix_store import tensors
from prefix_store.errors import PrefixMismatch
from prefix_store.geometry import Stack
from prefix_store.jobs import JobStatus, TrainingJob, TrainingSpec
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.rows import StackRows
from prefix_store.prefix import Method, PrefixManifest, PrefixRef
from prefix_store.store import Store
from prefix_store.tensors import PrefixTensors
from tests.models import CONTEXT, ENCODER_DECODERS, EOS, random_kvs, tiny_frozen
from tests.prefix_store.model.encoder_decoder import alone
from trainer import data, forward, samples, step, training_model
from trainer.data import Example
from trainer.forward import Group
from trainer.methods import METHODS
from trainer.methods.prefix import DirectKV
from trainer.slices import done
from trainer.tuning import Tuning
from trainer.worker import Worker

TENANT, NAME = "acme", "numbers"
EXAMPLES = [{"prompt": f"{number} is", "completion": " a number" * (1 + number % 3)} for number in range(12)]
QUICK = {"virtual_tokens": 3, "steps": 30, "batch_size": 2, "max_length": 48}
FROZEN = {family: training_model.attach(tiny_frozen(family)) for family in ("bart", "t5")}
JOBS: list[dict[str, Any]] = [
    {"virtual_tokens": 4, "batch_size": 4, "learning_rate": 0.3},
    {"virtual_tokens": 7, "batch_size": 1, "seed": 3, "stacks": ("encoder",)},
    {"method": "prompt", "virtual_tokens": 3, "batch_size": 2, "learning_rate": 0.5, "seed": 5},
    {"virtual_tokens": 2, "batch_size": 5, "learning_rate": 0.2, "seed": 7, "stacks": ("self", "cross")},
]


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.close()


def train(store: Store, family: str = "bart", examples=EXAMPLES, **options: Any) -> TrainingJob:
    """The job once it has ended."""
    asked = {name: value for name, value in {**QUICK, **options}.items() if value is not None}
    job = store.jobs.submit(TENANT, NAME, examples, asked)
    Worker(store, FROZEN[family], "w1", say=lambda line: None).run_until_empty()
    found = store.jobs.job(TENANT, job.id)
    assert found is not None
    return found


def published(store: Store) -> tuple[PrefixManifest, PrefixTensors]:
    return store.prefixes.read(store.prefixes.resolve(PrefixRef(TENANT, NAME)))


def spec(**options: Any) -> TrainingSpec:
    return TrainingSpec("0" * 64, len(EXAMPLES), **{"steps": 20, **QUICK, **options})


def encoded(frozen: FrozenModel, first: int = 0) -> list[Example]:
    return data.prepare(frozen, spec(), EXAMPLES[first:], EXAMPLES[:1]).train


def run(frozen: FrozenModel, first: int = 0, **options: Any) -> Tuning:
    """One that has not begun."""
    chosen, examples = spec(**options), encoded(frozen, first)
    text = [token for example in examples for token in example.source]
    return Tuning(METHODS[chosen.method](frozen, chosen, text), examples, chosen, validates=False)


def runs(frozen: FrozenModel) -> list[Tuning]:
    return [run(frozen, number, **options) for number, options in enumerate(JOBS)]


def kept(tunings: list[Tuning]) -> list[torch.Tensor]:
    return [tensor for one in tunings for tensor in one.result().tensors.values()]


def largest(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("family", FROZEN)
def test_a_job_becomes_a_prefix_with_three_stacks(store, family):
    job = train(store, family)
    assert (job.status, job.error) == (JobStatus.SUCCEEDED, None)
    manifest, found = published(store)
    tensors.validate(manifest, found)
    tensors.check_fits(manifest, FROZEN[family].geometry, FROZEN[family].digest, CONTEXT)
    assert (manifest.method, manifest.stacks, manifest.virtual_tokens) == (Method.PREFIX, tuple(Stack), 3)
    assert manifest.position_offset == 0
    events = store.jobs.events(TENANT, job.id, 0, 1000)
    losses = [event.data["train_loss"] for event in events if event.kind == "metrics"]
    assert losses[-1] < losses[0] - 0.3
    (shown,) = (event.data["samples"] for event in events if event.kind == "samples")
    assert shown[0]["prompt"].endswith(" is")
    assert shown[0]["expected"] == " a number"[: samples.TOKENS]
    assert shown[0]["before"] != shown[0]["after"]


@pytest.mark.parametrize(("asked", "given"), [(["encoder"], ["encoder"]), (["cross", "self"], ["self", "cross"])])
def test_a_job_may_ask_for_some_of_the_stacks(store, asked, given):
    assert train(store, stacks=asked).status is JobStatus.SUCCEEDED
    manifest, found = published(store)
    assert list(manifest.stacks) == given
    assert set(found) == {f"{stack}.kv" for stack in given}


@pytest.mark.parametrize(
    ("method", "options"), [("prompt", {}), ("prompt_mlp", {"bottleneck": 8}), ("prefix_mlp", {"bottleneck": 8})]
)
def test_the_other_methods(store, method, options):
    assert train(store, method=method, **options).status is JobStatus.SUCCEEDED
    manifest, found = published(store)
    tensors.validate(manifest, found)
    assert manifest.position_offset == 0
    expected = {"self.kv", "cross.kv", "encoder.kv"} if method == "prefix_mlp" else {"embeds"}
    assert set(found) == expected


def test_a_prefix_may_start_from_another_one(store):
    train(store, stacks=["cross", "encoder"])
    _, first = published(store)
    again = {"init_from": NAME, "publish_anyway": True, "steps": 1, "learning_rate": 1e-7}
    assert train(store, **again).status is JobStatus.SUCCEEDED
    manifest, second = published(store)
    assert manifest.stacks == (Stack.CROSS, Stack.ENCODER)
    assert largest(list(first.values()), list(second.values())) < 1e-5
    with pytest.raises(PrefixMismatch, match="expected stacks self, it has cross, encoder"):
        train(store, **again, stacks=["self"])


@pytest.mark.parametrize(
    ("options", "examples", "code", "says"),
    [
        ({"method": "prefix_plus", "virtual_tokens": None}, EXAMPLES, "invalid_request", "prefix_plus"),
        ({"objective": "distil", "context": "a long text"}, EXAMPLES, "invalid_request", "distil"),
        ({}, [{"text": "no prompt"}], "invalid_training_file", "encoder"),
    ],
)
def test_what_such_a_model_cannot_do_is_refused(store, options, examples, code, says):
    error = train(store, examples=examples, **options).error
    assert error.code == code
    assert says in error.message


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_the_loss_is_of_the_answer_alone(family):
    """Against transformers, one example after another: the start token, the completion, and the end behind it."""
    frozen = training_model.attach(tiny_frozen(family))
    kvs, examples = random_kvs(frozen, 3, 0), encoded(frozen)[:4]
    (found,) = forward.losses(frozen, [Group(StackRows.shared(kvs, len(examples), 0), examples)])
    expected = 0.0
    for line in EXAMPLES[:4]:
        source = frozen.tokenizer(line["prompt"]).input_ids
        labels = [*frozen.tokenizer(line["completion"], add_special_tokens=False).input_ids, EOS]
        logits = alone(family, source, [frozen.start_id, *labels[:-1]], kvs, 0)
        expected += torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum").item()
    assert found.item() == pytest.approx(expected, abs=1e-3)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW that does not make whole steps of gradients which are nothing but rounding, as 1e-8 lets it."""
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-2))


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(
    ("family", "steps"),
    [("bart", 4), ("t5", 1)],  # a tiny T5's ReLUs make another way of the last bit of a number
)
def test_sharing_a_step_is_training_alone(family, steps):
    frozen = FROZEN[family]
    apart = runs(frozen)
    losses = [[step.step(frozen, [one])[0] for _ in range(steps)] for one in apart]
    together = runs(frozen)
    found = [step.step(frozen, together) for _ in range(steps)]
    assert largest(kept(together), kept(apart)) < 1e-5
    torch.testing.assert_close(torch.tensor(found).T, torch.tensor(losses), atol=1e-5, rtol=0)
    moved = runs(frozen)
    assert min((a - b).abs().max().item() for a, b in zip(kept(together), kept(moved), strict=True)) > 1e-3


def test_a_prefix_that_waits_is_not_changed_by_a_bit():
    frozen = FROZEN["bart"]
    first, second = together = [run(frozen), run(frozen, 2, seed=4)]
    step.step(frozen, together)
    before = kept([second])
    step.step(frozen, [first])
    assert all(torch.equal(a, b) for a, b in zip(kept([second]), before, strict=True))


def test_groups_that_get_each_others_prefixes_are_wrong():
    """The control of the test above it: prefixes that are mixed up show in every group."""
    frozen = FROZEN["t5"]
    with torch.no_grad():
        groups = [one.group() for one in (run(frozen), run(frozen, seed=1, init="random_tokens"))]
        right = forward.logits(frozen, groups)
        wrong = forward.logits(
            frozen, [Group(groups[1].prefixes, groups[0].examples), Group(groups[0].prefixes, groups[1].examples)]
        )
    assert all((a - b).abs().max() > 0.1 for a, b in zip(right, wrong, strict=True))


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been():
    frozen = FROZEN["bart"]
    whole, first, second = (run(frozen) for _ in range(3))
    for _ in range(6):
        step.step(frozen, [whole])
    for _ in range(3):
        step.step(frozen, [first])
    second.load(first.to_bytes("model"), "model")
    for _ in range(3):
        step.step(frozen, [second])
    assert all(torch.equal(a, b) for a, b in zip(kept([second]), kept([whole]), strict=True))


@pytest.mark.parametrize("family", FROZEN)
def test_samples_are_what_the_model_would_say(family):
    frozen = FROZEN[family]
    kvs, examples = random_kvs(frozen, 3, 0), encoded(frozen)[:2]
    manifest = PrefixManifest(Method.PREFIX, frozen.geometry, 3, 0, stacks=tuple(Stack))
    made = done(samples.making(frozen, manifest, {f"{stack}.kv": kv for stack, kv in kvs.items()}, examples))
    for sample, example in zip(made, examples, strict=True):
        ids = [frozen.start_id]
        for _ in range(samples.TOKENS):
            ids.append(int(alone(family, example.source, ids, kvs, 0)[-1].argmax()))
            if ids[-1] in frozen.end_ids:
                ids.pop()
                break
        assert sample["after"] == frozen.tokenizer.decode(ids[1:], skip_special_tokens=True)


def test_an_answer_begins_in_training_as_the_generation_config_has_it_begin_in_serving():
    frozen = training_model.attach(tiny_frozen("bart"))
    frozen.model.generation_config.forced_bos_token_id = 7
    spec = TrainingSpec(data_digest="", examples=len(EXAMPLES), **QUICK)
    for example in data.prepare(frozen, spec, EXAMPLES).train:
        assert example.ids[: example.prompt_length] == (frozen.start_id, 7)


def test_a_method_that_knows_one_stack_tunes_the_decoders_own(store):
    """As a plugged-in one that was written for decoder-only models."""
    job = store.jobs.submit(TENANT, NAME, EXAMPLES, {**QUICK, "method": "own"}, methods=["own"])
    Worker(store, FROZEN["bart"], "w1", methods={"own": DirectKV}, say=lambda line: None).run_until_empty()
    assert store.jobs.job(TENANT, job.id).status is JobStatus.SUCCEEDED
    manifest, found = published(store)
    assert (manifest.stacks, manifest.position_offset, set(found)) == ((Stack.SELF,), 3, {"self.kv"})
