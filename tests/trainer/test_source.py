from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from prefix_store.errors import PrefixMismatch, PrefixNotFound
from prefix_store.jobs import JobStatus, TrainingJob, TrainingSpec
from prefix_store.model import apply
from prefix_store.prefix import Method, PrefixManifest, PrefixRef
from prefix_store.store import Store
from tests.models import BOS, random_kv, random_memory, tiny_frozen
from trainer import source
from trainer.data import Example
from trainer.worker import Worker

TENANT, P = "acme", 4
FROZEN = apply.attach(tiny_frozen("llama"))
EXAMPLES = [Example((BOS, 5, 6), 2), Example((BOS, 7), 1)]
ROWS = [{"prompt": f"{number} is", "completion": " a number"} for number in range(12)]


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.close()


def manifest(**fields) -> PrefixManifest:
    return dataclasses.replace(PrefixManifest(Method.PREFIX, FROZEN.geometry, P, P, FROZEN.digest), **fields)


def save(store: Store, name: str = "other", tenant: str = TENANT, **fields) -> torch.Tensor:
    kv = random_kv(FROZEN, P)
    store.prefixes.save(tenant, name, manifest(**fields), {"self.kv": kv})
    return kv


def job(**options) -> TrainingJob:
    spec = TrainingSpec("0" * 64, 2, **{"virtual_tokens": P, **options})
    return TrainingJob("j", TENANT, "x", spec, JobStatus.RUNNING, 0.0)


def test_a_prefix_starts_from_the_examples(store):
    assert list(source.start(store, job(), FROZEN, EXAMPLES)) == [BOS, 5, 6, BOS, 7]


def test_or_from_the_text_that_it_is_to_hold(store):
    found = source.start(store, job(objective="distil", context="a long text"), FROZEN, EXAMPLES)
    assert found == FROZEN.tokenizer("a long text").input_ids


def test_or_from_another_prefix(store):
    kv = save(store)
    found = source.start(store, job(init_from="acme/other@1"), FROZEN, EXAMPLES)
    assert isinstance(found, dict)
    assert torch.equal(found["self.kv"], kv)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"virtual_tokens": 5}, "expected virtual_tokens 5, it has 4"),
        ({"position_offset": 0}, {}, "expected position_offset 4, it has 0"),
        ({"base_digest": "1" * 64}, {}, "made for another base model"),
        ({"geometry": dataclasses.replace(FROZEN.geometry, family="gpt2")}, {}, "does not fit this model"),
    ],
)
def test_one_that_does_not_fit_is_refused(store, fields, options, message):
    save(store, **fields)
    with pytest.raises(PrefixMismatch, match=message):
        source.start(store, job(init_from="other", **options), FROZEN, EXAMPLES)


def test_a_memory_of_another_phi_is_refused(store):
    fields = {"method": Method.PREFIX_PLUS, "virtual_tokens": 0, "position_offset": 0, "feature_map": "gelu"}
    store.prefixes.save(TENANT, "other", manifest(**fields), {"memory": random_memory(FROZEN)})
    asked = {"init_from": "other", "method": "prefix_plus", "virtual_tokens": 0}
    with pytest.raises(PrefixMismatch, match="expected feature_map elu, it has gelu"):
        source.start(store, job(**asked), FROZEN, EXAMPLES)
    assert "memory" in source.start(store, job(**asked, feature_map="gelu"), FROZEN, EXAMPLES)


def test_what_is_gone_or_another_tenant_s_is_not_found(store):
    save(store, tenant="other")
    for asked in ("absent", "other/other"):
        with pytest.raises(PrefixNotFound):
            source.start(store, job(init_from=asked), FROZEN, EXAMPLES)


def train(store: Store, **options) -> dict[str, torch.Tensor]:
    given = {"steps": 1, "batch_size": 2, "max_length": 24, "learning_rate": 1e-7, "publish_anyway": True, **options}
    queued = store.jobs.submit(TENANT, "mine", ROWS, given)
    Worker(store, FROZEN, "w", say=lambda line: None).run_until_empty()
    done = store.jobs.job(TENANT, queued.id)
    assert done.status is JobStatus.SUCCEEDED, done.error
    return store.prefixes.read(store.prefixes.resolve(PrefixRef(TENANT, "mine", done.version)))[1]


def test_a_job_goes_on_from_the_version_that_was_meant_when_it_was_submitted(store):
    first = save(store)
    queued = store.jobs.submit(
        TENANT, "mine", ROWS, {"init_from": "other", "steps": 1, "learning_rate": 1e-7, "publish_anyway": True}
    )
    store.prefixes.save(TENANT, "other", manifest(), {"self.kv": random_kv(FROZEN, P, seed=1)})
    Worker(store, FROZEN, "w", say=lambda line: None).run_until_empty()
    assert store.jobs.job(TENANT, queued.id).status is JobStatus.SUCCEEDED
    _, kept = store.prefixes.read(store.prefixes.resolve(PrefixRef(TENANT, "mine")))
    torch.testing.assert_close(kept["self.kv"], first, atol=1e-5, rtol=0)


def test_a_run_that_has_begun_no_longer_needs_the_prefix_that_it_started_from(store):
    save(store)
    steps = {"init_from": "other", "steps": 6}
    undisturbed = store.jobs.submit(TENANT, "same", ROWS, steps)
    queued = store.jobs.submit(TENANT, "mine", ROWS, steps)

    def stop() -> None:
        if store.jobs.job(TENANT, queued.id).progress.get("step", 0) >= 2:
            worker.stop()

    worker = Worker(store, FROZEN, "w", say=lambda line: None, on_step=stop)
    worker.run()
    assert store.jobs.job(TENANT, queued.id).checkpoint is not None
    store.prefixes.delete(PrefixRef(TENANT, "other"))
    Worker(store, FROZEN, "w2", say=lambda line: None).run_until_empty()
    ends = [store.jobs.job(TENANT, job.id) for job in (undisturbed, queued)]
    assert [job.status for job in ends] == [JobStatus.SUCCEEDED] * 2
    one, other = (store.prefixes.resolve(PrefixRef(TENANT, name)).digest for name in ("same", "mine"))
    assert one == other


def test_a_distilled_prefix_starts_as_its_text(store):
    text = "Mo is a cat."
    kept = train(store, objective="distil", context=text, virtual_tokens=8)
    start = apply.prefill_kv(FROZEN, FROZEN.tokenizer(text).input_ids[:8])
    torch.testing.assert_close(kept["self.kv"], start, atol=1e-5, rtol=0)
    assert not torch.allclose(train(store, virtual_tokens=8)["self.kv"], start, atol=0.1)


@pytest.mark.parametrize("method", ["prefix_plus", "prefix_mlp", "prompt_lstm"])
def test_a_worker_trains_every_kind(store, method):
    assert train(store, method=method).keys() == {
        {"prefix_plus": "memory", "prefix_mlp": "self.kv", "prompt_lstm": "embeds"}[method]
    }
