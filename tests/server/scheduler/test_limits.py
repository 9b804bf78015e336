import pytest

from prefix_store.errors import ContextLengthExceeded, InvalidRequest
from server.scheduler.limits import Limits, check_fits
from server.scheduler.messages import PrefixPayload
from tests.server.scheduler.traffic import make_request

LIMITS = Limits(slots=150, rows=8, step_tokens=32, context_length=100, waiting=50)
PREFIX = PrefixPayload("p", 20, 20, True, None)
MEMORY = PrefixPayload("m", 0, 0, True, None, feature_map="elu", memory_slots=20)


def test_what_can_never_run_is_refused_with_the_numbers():
    with pytest.raises(ContextLengthExceeded, match=r"maximum context length is 100 .* 130: 20 of the prefix, 100 of"):
        check_fits(make_request("a", "r", prompt=100, new=10, prefix=PREFIX), LIMITS)
    with pytest.raises(InvalidRequest, match="empty"):
        check_fits(make_request("a", "r", prompt=0), LIMITS)
    small = Limits(slots=50, rows=8, step_tokens=32, context_length=100, waiting=50)
    with pytest.raises(InvalidRequest, match="needs 60 KV slots, this server has 50"):
        check_fits(make_request("a", "r", prompt=50, new=10), small)


def test_what_just_fits_is_taken():
    check_fits(make_request("a", "r", prompt=70, new=10, prefix=PREFIX), LIMITS)


def test_a_memory_takes_slots_and_no_context():
    check_fits(make_request("a", "r", prompt=70, new=30, prefix=MEMORY), LIMITS)
    small = Limits(slots=110, rows=8, step_tokens=32, context_length=100, waiting=50)
    with pytest.raises(InvalidRequest, match="needs 120 KV slots, this server has 110"):
        check_fits(make_request("a", "r", prompt=70, new=30, prefix=MEMORY), small)
