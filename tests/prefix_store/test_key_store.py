import pytest

from prefix_store.errors import InvalidName, InvalidRequest, Unauthorized
from prefix_store.store import Store
from prefix_store.tenants import new_key
from tests.prefix_store.samples import Clock


@pytest.fixture
def keys(tmp_path):
    store = Store.open(f"sqlite:///{tmp_path}/store.db", clock=Clock())
    yield store.keys
    store.close()


def test_a_key_authenticates_its_tenant(keys):
    presented, key = keys.create("acme", ["generate", "train"])
    assert keys.authenticate(presented) == key
    assert (key.tenant, key.scopes, key.created_at) == ("acme", {"generate", "train"}, 1000.0)


def test_the_store_never_holds_the_secret(keys, tmp_path):
    presented, _ = keys.create("acme", ["generate"])
    secret = presented.rpartition("_")[2].encode()
    assert not any(secret in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_whatever_is_wrong_the_answer_is_the_same(keys):
    presented, key = keys.create("acme", ["generate"])
    unknown, _ = new_key("acme", frozenset({"generate"}), 0.0)
    keys.remove(key.id)
    other, _ = keys.create("acme", ["generate"])
    answers = set()
    for attempt in ["", "sk-1", "ключ", unknown, presented, other[:-1] + ("A" if other[-1] != "A" else "B"), other * 9]:
        with pytest.raises(Unauthorized) as caught:
            keys.authenticate(attempt)
        answers.add(caught.value.message)
    assert len(answers) == 1


def test_keys_are_listed_and_removed(keys):
    assert not keys.any()
    _, first = keys.create("acme", ["generate"])
    _, second = keys.create("other", ["admin"])
    assert list(keys.all()) == [first, second]
    assert keys.remove(first.id)
    assert not keys.remove(first.id)
    assert keys.any()


@pytest.mark.parametrize("scopes", [[], ["root"], ["generate", "root"]])
def test_unknown_scopes_are_refused(keys, scopes):
    with pytest.raises(InvalidRequest, match="scopes must be"):
        keys.create("acme", scopes)


def test_illegal_tenants_are_refused(keys):
    with pytest.raises(InvalidName, match="tenant"):
        keys.create("Acme Inc.", ["generate"])
