import pytest

from prefix_store.tenants import hash_key, key_id_of, new_key


def test_a_key_matches_only_itself():
    presented, key = new_key("acme", frozenset({"generate"}), 5.0)
    other, _ = new_key("acme", frozenset({"generate"}), 5.0)
    assert key.matches(presented)
    assert not key.matches(other)
    assert not key.matches(presented[:-1])


def test_the_secret_is_not_in_the_record():
    presented, key = new_key("acme", frozenset({"generate"}), 5.0)
    assert presented.rpartition("_")[2] not in repr(key)
    assert key.secret_hash == hash_key(presented)
    assert key_id_of(presented) == key.id


@pytest.mark.parametrize("presented", ["", "afx_", "sk-123", "afx_abcdefgh_" + "x" * 42, "afx_abcdefgh_" + "é" * 43])
def test_what_is_not_shaped_like_a_key_has_no_id(presented):
    assert key_id_of(presented) is None


def test_a_trailing_newline_is_no_key():
    presented, _ = new_key("acme", frozenset({"generate"}), 5.0)
    assert key_id_of(presented + "\n") is None


def test_admin_includes_every_scope():
    _, plain = new_key("acme", frozenset({"generate"}), 0.0)
    _, admin = new_key("acme", frozenset({"admin"}), 0.0)
    assert plain.allows("generate")
    assert not plain.allows("train")
    assert admin.allows("train")
