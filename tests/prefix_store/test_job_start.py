"""A job whose prefix cannot start from the one it names is refused when it is submitted, and nothing is kept of it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest

from prefix_store.errors import PrefixMismatch, PrefixNotFound
from prefix_store.job_start import STARTS
from prefix_store.jobs import BUILT_IN_METHODS
from prefix_store.prefix import Method, PrefixManifest, PrefixRef
from prefix_store.store import Store
from prefix_store.tensors import check_fits
from tests.prefix_store.samples import GEOMETRY, LENGTH, manifest, tensors

EXAMPLES = [{"prompt": "1 is", "completion": " one"}]
KINDS = (Method.PREFIX, Method.PROMPT, Method.PREFIX_PLUS)


def save(store: Store, of: PrefixManifest) -> None:
    store.prefixes.save("acme", "first", of, tensors(of))


def submit(store: Store, **options: Any) -> Any:
    context = options.pop("context_length", 1024)
    fits = partial(check_fits, geometry=GEOMETRY, base_digest="b" * 64, context_length=context)
    return store.jobs.submit("acme", "mine", EXAMPLES, {"init_from": "first", **options}, fits=fits)


@pytest.mark.parametrize("method", BUILT_IN_METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_method_goes_on_from_its_own_kind_alone(store, kind, method):
    save(store, manifest(kind))
    if kind in STARTS[method]:
        assert submit(store, method=method).spec.init_from == "acme/first@1"
    else:
        with pytest.raises(PrefixMismatch, match=f"method {method} starts from .* is one of {kind}") as caught:
            submit(store, method=method)
        assert caught.value.param == "init_from"
        assert store.jobs.jobs("acme", None, 10) == []


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"position_offset": 0}, {}, f"expected position_offset {LENGTH}, it has 0"),
        ({"base_digest": "c" * 64}, {}, "made for another base model"),
        ({"geometry": dataclasses.replace(GEOMETRY, family="other")}, {}, "does not fit this model"),
        ({}, {"context_length": LENGTH + 1}, "leave no room in a context of"),
        ({"base_digest": "b" * 64}, {"base_digest": "c" * 64}, "expected base_digest c+, it has b+"),
    ],
)
def test_one_that_does_not_fit_model_or_job_is_refused(store, changed, options, message):
    save(store, dataclasses.replace(manifest(), **changed))
    with pytest.raises(PrefixMismatch, match=message) as caught:
        submit(store, **options)
    assert caught.value.param == "init_from"
    assert store.jobs.jobs("acme", None, 10) == []


def test_a_memory_of_another_phi_is_refused(store):
    save(store, manifest(Method.PREFIX_PLUS))
    other = {"elu": "gelu", "gelu": "elu"}[str(manifest(Method.PREFIX_PLUS).feature_map)]
    with pytest.raises(PrefixMismatch, match=f"expected feature_map {other}, it has"):
        submit(store, method="prefix_plus", feature_map=other)


def test_of_a_plugged_in_method_the_worker_alone_knows(store):
    save(store, manifest(Method.PROMPT))
    options = {"init_from": "first", "method": "low_rank"}
    assert store.jobs.submit("acme", "mine", EXAMPLES, options, methods=["low_rank"]).spec.method == "low_rank"


def test_one_that_is_deleted_meanwhile_is_not_found(store, monkeypatch):
    save(store, manifest())
    file = store.blobs.file

    def late(digest: str) -> Any:
        store.prefixes.delete(PrefixRef("acme", "first"))
        store.blobs.remove_unless(digest, lambda: False)
        return file(digest)

    monkeypatch.setattr(store.blobs, "file", late)
    with pytest.raises(PrefixNotFound):
        submit(store)
