import pytest

from prefix_store.errors import ContextLengthExceeded, InvalidRequest
from prefix_store.geometry import Stack
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


def test_only_what_stands_before_an_answer_takes_its_context():
    before, beside, moved = (
        PrefixPayload("p", 20, offset, True, None, stacks=stacks)
        for offset, stacks in ((0, (Stack.SELF,)), (0, (Stack.ENCODER, Stack.CROSS)), (20, (Stack.ENCODER,)))
    )
    for prefix, room in ((before, 79), (beside, 99), (moved, 79)):
        check_fits(make_request("a", "r", prompt=1, new=room, prefix=prefix, source=5), LIMITS)
        with pytest.raises(ContextLengthExceeded, match="1 that every answer begins with"):
            check_fits(make_request("a", "r", prompt=1, new=room + 1, prefix=prefix, source=5), LIMITS)


def test_a_source_has_a_context_of_its_own_and_takes_slots():
    all_stacks = PrefixPayload("p", 20, 20, True, None, stacks=tuple(Stack))
    check_fits(make_request("a", "r", prompt=1, new=79, prefix=PREFIX, source=50), LIMITS)
    with pytest.raises(InvalidRequest, match="needs 170 KV slots, this server has 150"):
        check_fits(make_request("a", "r", prompt=1, new=79, prefix=all_stacks, source=50), LIMITS)
    with pytest.raises(ContextLengthExceeded, match="encoder reads at most 100 tokens; the request has 101, 0 of"):
        check_fits(make_request("a", "r", prompt=1, source=101), LIMITS)


def test_a_soft_prompt_counts_in_the_source_and_not_in_the_answer():
    soft = PrefixPayload("p", 20, 0, True, None, is_embeds=True, stacks=())
    check_fits(make_request("a", "r", prompt=1, new=69, prefix=soft, source=60), LIMITS)
    with pytest.raises(ContextLengthExceeded, match="the request has 101, 20 of them the prefix's"):
        check_fits(make_request("a", "r", prompt=1, prefix=soft, source=81), LIMITS)
