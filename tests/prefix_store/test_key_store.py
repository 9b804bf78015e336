import pytest

from prefix_store.errors import Conflict, InvalidName, InvalidRequest, NotFound, Unauthorized
from prefix_store.tenants import new_key


@pytest.fixture
def keys(store):
    return store.keys


def test_a_key_authenticates_its_tenant(keys):
    presented, key = keys.create("acme", ["generate", "train"])
    assert keys.authenticate(presented) == key
    assert (key.tenant, key.scopes, key.created_at, key.expires_at) == ("acme", {"generate", "train"}, 1000.0, None)


def test_the_store_never_holds_the_secret(keys, tmp_path, tmp_path_factory):
    presented, key = keys.create("acme", ["generate"])
    secret = presented.removeprefix(f"afx_{key.id}_").encode()
    assert len(secret) == 43
    for folder in (tmp_path, tmp_path_factory.getbasetemp()):
        assert not any(secret in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_whatever_is_wrong_the_answer_is_the_same(keys):
    presented, key = keys.create("acme", ["generate"])
    unknown, _ = new_key("acme", frozenset({"generate"}), 0.0)
    keys.remove(key.id)
    expired, _ = keys.create("acme", ["generate"], lifetime=0.0)
    other, _ = keys.create("acme", ["generate"])
    wrong = other[:-1] + ("A" if other[-1] != "A" else "B")
    answers = set()
    for attempt in ["", "sk-1", "ключ", unknown, presented, expired, wrong, other * 9]:
        with pytest.raises(Unauthorized) as caught:
            keys.authenticate(attempt)
        answers.add(caught.value.message)
    assert len(answers) == 1


def test_keys_are_listed_and_removed(keys, clock):
    assert not keys.any()
    _, first = keys.create("acme", ["generate"])
    clock.now += 1
    _, second = keys.create("other", ["admin"])
    assert list(keys.all()) == [first, second]
    assert keys.remove(first.id)
    assert not keys.remove(first.id)
    assert keys.any()


def test_a_key_ends_when_its_time_is_up(keys, clock):
    presented, key = keys.create("acme", ["generate"], lifetime=60.0)
    assert key.expires_at == 1060.0
    clock.now += 59.9
    assert keys.authenticate(presented) == key
    clock.now += 0.1
    with pytest.raises(Unauthorized):
        keys.authenticate(presented)
    assert list(keys.all()) == [key]
    assert keys.any()  # an expired key does not open a closed server


def test_a_key_is_replaced_with_both_good_for_a_while(keys, clock):
    old, key = keys.create("acme", ["generate", "train"])
    new, renewed = keys.rotate(key.id, overlap=60.0)
    assert (renewed.tenant, renewed.scopes, renewed.expires_at) == ("acme", key.scopes, None)
    assert renewed.id != key.id
    assert keys.authenticate(old).id == key.id
    clock.now += 60
    assert keys.authenticate(new) == renewed
    with pytest.raises(Unauthorized):
        keys.authenticate(old)


def test_replacing_a_key_never_makes_the_old_one_last_longer(keys):
    _, key = keys.create("acme", ["generate"], lifetime=10.0)
    _, other = keys.create("acme", ["generate"], lifetime=10.0)
    keys.rotate(key.id, overlap=60.0)
    assert {each.expires_at for each in keys.all() if each.id == key.id} == {1010.0}
    keys.rotate(other.id, overlap=0.0)
    assert {each.expires_at for each in keys.all() if each.id == other.id} == {1000.0}
    with pytest.raises(NotFound):
        keys.rotate("00000000", overlap=0.0)


def test_the_first_key_makes_the_tenant(store, keys):
    keys.create("acme", ["generate"])
    assert [tenant.name for tenant in store.tenants.all()] == ["acme"]


@pytest.mark.parametrize("scopes", [[], ["root"], ["generate", "root"]])
def test_unknown_scopes_are_refused(keys, scopes):
    with pytest.raises(InvalidRequest, match="scopes must be"):
        keys.create("acme", scopes)


def test_illegal_tenants_are_refused(keys):
    with pytest.raises(InvalidName, match="tenant"):
        keys.create("Acme Inc.", ["generate"])


def test_what_is_done_to_keys_is_in_the_audit_log(store, keys):
    _, key = keys.create("acme", ["generate"], by="key abcdefgh")
    _, renewed = keys.rotate(key.id, overlap=0.0)
    keys.remove(key.id)
    actions = sorted((line.action, line.target, line.by) for line in store.audit.entries(tenant="acme"))
    assert actions == sorted(
        [
            ("key.create", key.id, "key abcdefgh"),
            ("key.rotate", key.id, "local"),
            ("key.create", renewed.id, "local"),
            ("key.remove", key.id, "local"),
        ]
    )


def test_a_key_that_ends_is_replaced_by_one_that_lasts_as_long(keys, clock):
    _, key = keys.create("acme", ["generate"], lifetime=100.0)
    clock.now += 50
    renewed = keys.rotate(key.id, overlap=10.0)[1]
    assert renewed.expires_at == 1150.0
    assert keys.rotate(renewed.id, overlap=10.0, lifetime=7.0)[1].expires_at == 1057.0


def test_a_key_has_one_successor(keys):
    _, key = keys.create("acme", ["generate"], lifetime=100.0)
    _, renewed = keys.rotate(key.id, overlap=50.0)
    with pytest.raises(Conflict, match=f"successor {renewed.id}"):
        keys.rotate(key.id, overlap=50.0)
    assert {each.id for each in keys.all()} == {key.id, renewed.id}


def test_an_expired_key_cannot_be_replaced(keys, clock):
    _, key = keys.create("acme", ["generate"], lifetime=100.0)
    clock.now += 100
    with pytest.raises(Conflict, match="has expired"):
        keys.rotate(key.id, overlap=60.0)
    assert list(keys.all()) == [key]
