import pytest

from prefix_store import holds
from prefix_store.errors import StoreUnavailable
from tests.prefix_store import invariants


def held(backend):
    return [key for key in invariants.records(backend)["blob"] if "/hold/" in key]


def test_a_hold_is_there_while_it_is_held_and_until_it_is_released(backend):
    with holds.held(backend, "acme", "a" * 64) as key:
        assert held(backend) == [key.removeprefix("blob/")]
    assert held(backend)
    backend.write(lambda transaction: holds.release(transaction, key))
    assert held(backend) == []


def test_a_hold_ends_with_what_failed(backend):
    with pytest.raises(KeyError), holds.held(backend, "acme", "a" * 64):
        raise KeyError
    assert held(backend) == []


def test_a_failure_is_told_even_when_the_store_is_away(backend):
    def lose_the_store():
        with holds.held(backend, "acme", "a" * 64):
            backend.close()
            raise KeyError

    with pytest.raises(KeyError):
        lose_the_store()


def test_a_hold_is_released_once(backend):
    with holds.held(backend, "acme", "a" * 64) as key:
        backend.write(lambda transaction: holds.release(transaction, key))
        with pytest.raises(StoreUnavailable, match="took too long"):
            backend.write(lambda transaction: holds.release(transaction, key))


def test_two_writers_of_the_same_content_hold_it_apart(backend):
    with holds.held(backend, "acme", "a" * 64) as first, holds.held(backend, "other", "a" * 64) as second:
        backend.write(lambda transaction: holds.release(transaction, first))
        assert held(backend) == [second.removeprefix("blob/")]
