import pytest

from server.scheduler.service import Service
from tests.server.scheduler.traffic import make_sequence


def test_a_generated_token_weighs_two_prompt_tokens():
    service, sequence = Service(), make_sequence("a", prompt=10)
    sequence.computed = 7
    service.charge(sequence, sampled=False)
    assert (service.received("a"), service.owed(sequence)) == (7, 3)
    sequence.computed = 10
    service.charge(sequence, sampled=True)
    sequence.computed = 11
    service.charge(sequence, sampled=True)
    assert (service.received("a"), service.owed(sequence)) == (10 + 2 * 2, 0)


def test_what_is_computed_again_is_free():
    service, sequence = Service(), make_sequence("a", prompt=10)
    for computed in (6, 0, 3, 8):  # 0: a preemption
        sequence.computed = computed
        service.charge(sequence, sampled=False)
        service.check_integrity([sequence])
    assert (service.received("a"), service.owed(sequence)) == (8, 2)


def test_a_lift_never_lowers():
    service = Service()
    service.lift("a", 5)
    service.lift("a", 3)
    assert (service.received("a"), service.received("b")) == (5, 0)


def test_the_books_are_closed_for_a_sequence_that_has_ended():
    service, sequence = Service(), make_sequence("a", prompt=10)
    sequence.computed = 4
    service.charge(sequence, sampled=False)
    with pytest.raises(AssertionError, match="still on the books"):
        service.check_integrity([])
    service.settle(sequence)
    service.check_integrity([])
    assert service.received("a") == 4
