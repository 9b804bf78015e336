from pathlib import Path

import pytest

from prefix_store.answers import CLAIM_SECONDS, KEPT_SECONDS, Claim, settle
from prefix_store.errors import KeyReused, StillRunning
from prefix_store.store import Store
from tests.prefix_store.samples import Clock


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock):
    opened = Store.open(f"sqlite:///{tmp_path}/store.db", clock=clock)
    yield opened
    opened.close()


def finish(store: Store, claim: Claim, answer: str) -> None:
    store.backend.write(lambda transaction: settle(transaction, claim, answer))


def test_a_request_is_claimed_once_and_then_has_its_answer(store):
    claim = store.answers.begin("acme", "key", "f")
    with pytest.raises(StillRunning):
        store.answers.begin("acme", "key", "f")
    finish(store, claim, "done")
    assert store.answers.begin("acme", "key", "f") == "done"
    with pytest.raises(KeyReused):
        store.answers.begin("acme", "key", "g")
    assert isinstance(store.answers.begin("other", "key", "g"), Claim)


def test_a_claim_that_is_given_back_is_free(store):
    store.answers.forget(store.answers.begin("acme", "key", "f"))
    assert isinstance(store.answers.begin("acme", "key", "g"), Claim)


def test_an_answer_is_not_given_back(store):
    claim = store.answers.begin("acme", "key", "f")
    finish(store, claim, "done")
    store.answers.forget(claim)
    assert store.answers.begin("acme", "key", "f") == "done"


def test_a_claim_lapses_and_whoever_held_it_can_do_nothing_more(store, clock):
    lost = store.answers.begin("acme", "key", "f")
    clock.now += CLAIM_SECONDS
    taken = store.answers.begin("acme", "key", "f")
    with pytest.raises(StillRunning):
        finish(store, lost, "twice")
    store.answers.forget(lost)
    finish(store, taken, "once")
    assert store.answers.begin("acme", "key", "f") == "once"


def test_answers_are_kept_for_a_day_and_then_collected(store, clock):
    finish(store, store.answers.begin("acme", "old", "f"), "done")
    clock.now += KEPT_SECONDS / 2
    finish(store, store.answers.begin("acme", "young", "f"), "done")
    clock.now += KEPT_SECONDS / 2
    store.collect()
    with store.backend.view() as view:
        assert len(view.scan("once/")) == 1
    assert store.answers.begin("acme", "young", "f") == "done"
    assert isinstance(store.answers.begin("acme", "old", "g"), Claim)


def test_no_key_stands_in_the_store_as_it_came(store, tmp_path):
    store.answers.begin("acme", "a-secret-of-the-client", "f")
    assert not any(b"a-secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
