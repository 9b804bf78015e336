from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.scheduler import fairness
from server.scheduler.service import Service
from server.scheduler.waiting import Line
from tests.server.scheduler.traffic import make_sequence


def rows(tenants: str) -> list:
    """One running row a letter, oldest first."""
    return [make_sequence(tenant, prompt=1) for tenant in tenants]


def line(tenant: str, length: int = 2) -> Line:
    made = Line(tenant)
    for _ in range(length):
        made.push(make_sequence(tenant))
    return made


def order(lines, running, allowance: int = 10, **received: int) -> tuple[str, str]:
    service = Service()
    for sequence in running:
        sequence.computed = 1
        service.charge(sequence, sampled=False)
    for tenant, amount in received.items():
        service.lift(tenant, amount)
    entitled, others = fairness.turns(lines, running, service, allowance)
    return "".join(line.tenant for line in entitled), "".join(line.tenant for line in others)


def test_least_service_comes_first_and_then_fewest_rows():
    lines = [line(tenant) for tenant in "abc"]
    assert order(lines, rows("abc"), a=9, b=7, c=8) == ("", "bca")
    assert order(lines, rows("abcb"), a=7, b=7, c=8) == ("", "abc")


def test_who_has_no_row_comes_before_all_who_do():
    lines = [line(tenant) for tenant in "abc"]
    assert order(lines, rows("aab"), a=3, b=4, c=9) == ("", "cab")


def test_entitled_is_who_has_no_row_and_the_least_service_or_one_request():
    assert order([line("a"), line("b")], rows("a"), a=5, b=5) == ("b", "a")
    assert order([line("a"), line("b")], rows("a"), a=5, b=6) == ("", "ba")
    assert order([line("a"), line("b", 1)], rows("a"), a=5, b=6) == ("b", "a")


def test_who_is_too_far_ahead_has_to_wait_whatever_else():
    lines = [line("a"), line("b", 1), line("c")]
    assert order(lines, rows("ac"), a=5, b=15, c=15) == ("b", "ac")
    assert order(lines, rows("ac"), a=5, b=16, c=16) == ("", "a")


def test_prompts_that_are_running_count_as_served():
    running = [make_sequence("a", prompt=20)]
    entitled, others = fairness.turns([line("a"), line("b")], [*running, *rows("b")], Service(), 100)
    assert (entitled, [line.tenant for line in others]) == ([], ["b", "a"])


@given(budget=st.integers(0, 60), prompts=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(2, 30)), max_size=10))
def test_shares_are_those_of_dealing_tokens_out_one_by_one(budget, prompts):
    sequences = [make_sequence(tenant, prompt) for tenant, prompt in prompts]
    wants = Counter()
    for tenant, prompt in prompts:
        wants[tenant] += prompt
    dealt = Counter()
    for _ in range(min(budget, wants.total())):
        # to whoever has least of those who want more; who wants least counts as first
        poorest = min(
            (t for t in wants if dealt[t] < wants[t]), key=lambda t: (dealt[t], wants[t], list(wants).index(t))
        )
        dealt[poorest] += 1
    chunks = fairness.share_out(budget, sequences)
    given_out = Counter()
    for sequence, count in chunks:
        assert 0 < count <= sequence.remaining
        given_out[sequence.request.tenant] += count
    assert given_out == dealt
    for tenant in wants:
        # within a tenant at least half goes to the first, and of the others only one is cut short: none shorter waits
        own = {s: c for s, c in chunks if s.request.tenant == tenant}
        first, *others = (s for s in sequences if s.request.tenant == tenant)
        assert own.get(first, 0) >= min(first.remaining, -(-dealt[tenant] // 2))
        assert list(own) == [s for s in (first, *others) if s in own]
        served = sorted(others, key=lambda s: s.remaining)[: len(own.keys() - {first})]
        assert own.keys() - {first} == set(served)
        assert all(own[s] == s.remaining for s in served[:-1])


def test_rows_are_taken_from_who_has_most_newest_first_and_one_is_left():
    running = rows("abaacb")
    taken = fairness.make_way(running, (), lambda leaving: len(leaving) == 3)
    assert taken == [running[3], running[5], running[2]]
    assert fairness.make_way(running, (), lambda leaving: len(leaving) > 3) is None


def test_a_flood_gives_its_only_row_last():
    running = rows("abac")
    assert fairness.make_way(running, "bc", lambda leaving: len(leaving) >= 2) == [running[2], running[3]]
    assert fairness.make_way(rows("abc"), "d", bool) is None
    assert fairness.make_way([], "a", bool) is None


def test_a_group_of_beams_counts_as_its_rows_and_leaves_as_one():
    running = [*rows("aa"), make_sequence("b", beams=4), *rows("cc"), make_sequence("c", beams=2)]
    assert fairness.rows_by_tenant(running) == {"a": 2, "b": 4, "c": 4}
    assert fairness.newest_of_most(running, fairness.rows_by_tenant(running)) is running[5]
    taken = fairness.make_way(running, (), lambda leaving: len(leaving) == 3)
    assert taken == [running[5], running[4], running[1]]
    # b's only one stays, for all that it is the widest
    assert fairness.make_way(running, (), lambda leaving: len(leaving) > 3) is None


def test_rows_that_do_not_help_stay():
    running = rows("aaaaaa")
    helps = {running[1], running[3]}
    assert fairness.make_way(running, (), helps.issubset) == [running[3], running[1]]
