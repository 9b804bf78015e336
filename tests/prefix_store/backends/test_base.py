"""The contract that `backends.base.Backend` states, for every backend."""

import random
import threading
import time

import pytest

from prefix_store.backends.base import PAGE, walk
from prefix_store.errors import Conflict, StoreUnavailable
from prefix_store.store import Store

ORDINARY = ["a/b", "a/b/c", "a/c", "a0/x", "a-/x", "aa/x", "b/a", "c"]


def put(backend, records):
    def work(transaction):
        for key, value in records.items():
            transaction.put(key, value)

    backend.write(work)


def delete(backend, *keys):
    backend.write(lambda transaction: [transaction.delete(key) for key in keys])


def get(backend, key):
    with backend.view() as view:
        return view.get(key)


def scan(backend, prefix, **options):
    with backend.view() as view:
        return view.scan(prefix, **options)


def keys(backend, prefix, **options):
    return [key for key, _ in scan(backend, prefix, **options)]


def interleaved(backend, first, second):
    """Runs `second` when `first(transaction, meanwhile)` first says `meanwhile()`, as far as the backend lets it."""
    others = []

    def meanwhile():
        if not others:
            others.append(threading.Thread(target=backend.write, args=(second,)))
            others[0].start()
            others[0].join(0.1)  # where writers wait for one another it goes on only after `first`

    result = backend.write(lambda transaction: first(transaction, meanwhile))
    others[0].join()
    return result


# reading


def test_what_was_put_is_read_and_what_was_not_is_none(backend):
    put(backend, {"a/b": {"n": 1}, "a/c": [1, 2]})
    assert get(backend, "a/b") == {"n": 1}
    assert get(backend, "a/d") is None
    with backend.view() as view:
        assert view.get_many(["a/c", "a/d", "a/b"]) == [[1, 2], None, {"n": 1}]
        assert view.get_many([]) == []


@pytest.mark.parametrize(
    "value",
    ["", "Grüße 你好 😀", "\ud800", '"\\\n\0\x7f', 0.1, 1e300, 2**53, -0.0, True, [], {}, {"": [None]}, "x" * 10**6],
)
def test_values_come_back_as_they_were(backend, value):
    put(backend, {"a/b": {"value": value}})
    assert get(backend, "a/b") == {"value": value}
    assert scan(backend, "a/") == [("b", {"value": value})]


def test_a_scan_stays_in_its_folder_and_goes_by_bytes(backend):
    put(backend, {key: key for key in reversed(ORDINARY)})
    assert scan(backend, "a/") == [("b", "a/b"), ("b/c", "a/b/c"), ("c", "a/c")]
    assert keys(backend, "a-/") == keys(backend, "a0/") == keys(backend, "aa/") == ["x"]
    assert keys(backend, "a/b/") == ["c"]
    assert keys(backend, "d/") == []


def test_a_scan_goes_on_behind_a_key_present_or_not(backend):
    put(backend, {f"a/{number:03d}": number for number in range(10)})
    assert keys(backend, "a/", after="004", limit=2) == ["005", "006"]
    assert keys(backend, "a/", after="0045", limit=2) == ["005", "006"]
    assert keys(backend, "a/", after="009") == keys(backend, "a/", limit=0) == []
    assert keys(backend, "a/", descending=True, limit=2) == ["009", "008"]
    assert keys(backend, "a/", after="002", descending=True) == ["001", "000"]
    assert keys(backend, "a/", after="000", descending=True) == []


@pytest.mark.parametrize("seed", range(3))
def test_any_history_reads_as_a_sorted_table_would(backend, seed):
    draws, table = random.Random(seed), {}
    parts = ["a", "a-", "a.b", "a0", "b", "~", "A", "*", "000000001"]
    for _ in range(60):
        key = "/".join(draws.choices(parts, k=draws.randint(1, 3)))
        if draws.random() < 0.3:
            delete(backend, key)
            table.pop(key, None)
        else:
            put(backend, {key: draws.random()})
            table[key] = None
        prefix = "/".join(draws.choices(parts, k=draws.randint(1, 2))) + "/"
        descending, limit = draws.random() < 0.5, draws.choice([None, 1, 3])
        inside = sorted((key[len(prefix) :] for key in table if key.startswith(prefix)), reverse=descending)
        assert keys(backend, prefix, descending=descending, limit=limit) == inside[:limit]


def test_a_walk_gives_all_of_a_folder(backend):
    count = PAGE + 7
    put(backend, {f"a/{number:05d}": number for number in range(count)})
    put(backend, {"b/x": 0})
    assert [value for _, value in walk(backend, "a/")] == list(range(count))
    assert [value for _, value in walk(backend, "a/", after="00004")] == list(range(5, count))


# writing


def test_a_transaction_reads_its_own_writes_and_scans_what_was_before(backend):
    put(backend, {"a/1": "old", "a/2": "old"})

    def work(transaction):
        transaction.put("a/1", "new")
        transaction.delete("a/2")
        transaction.put("a/3", "new")
        assert [transaction.get(key) for key in ("a/1", "a/2", "a/3")] == ["new", None, "new"]
        assert transaction.get_many(["a/3", "a/4", "a/2", "a/1"]) == ["new", None, None, "new"]
        assert transaction.scan("a/") == [("1", "old"), ("2", "old")]
        transaction.delete("a/3")
        transaction.put("a/2", "again")
        return "result"

    assert backend.write(work) == "result"
    assert scan(backend, "a/") == [("1", "new"), ("2", "again")]


def test_deleting_what_is_not_there_is_no_error(backend):
    delete(backend, "a/1", "a/1")
    assert scan(backend, "a/") == []


@pytest.mark.parametrize("error", [Conflict("no"), KeyError("x"), KeyboardInterrupt()])
def test_a_transaction_that_raises_leaves_nothing(backend, error):
    put(backend, {"a/1": 1})

    def fail(transaction):
        transaction.put("a/1", 2)
        transaction.put("a/2", 2)
        raise error

    with pytest.raises(type(error)):
        backend.write(fail)
    assert scan(backend, "a/") == [("1", 1)]
    put(backend, {"a/3": 3})


def test_a_record_can_be_large(backend):
    put(backend, {"a/1": {"text": "é" * 500_000}})
    backend.write(lambda transaction: transaction.put("a/2", len(transaction.get("a/1")["text"])))
    assert get(backend, "a/2") == 500_000


# together


def test_no_update_is_lost(backend):
    def first(transaction, meanwhile):
        count = transaction.get("count")
        meanwhile()
        transaction.put("count", count + 1)

    put(backend, {"count": 0})
    interleaved(backend, first, lambda transaction: transaction.put("count", transaction.get("count") + 1))
    assert get(backend, "count") == 2


def test_what_was_absent_when_it_was_read_is_absent_when_it_is_written(backend):
    def take(transaction, who):
        if transaction.get("seat") is None:
            transaction.put("seat", who)

    def first(transaction, meanwhile):
        seen = transaction.get("seat")
        meanwhile()
        if seen is None:
            transaction.put("seat", "first")
        return seen

    seen = interleaved(backend, first, lambda transaction: take(transaction, "second"))
    assert get(backend, "seat") == ("first" if seen is None else "second")


@pytest.mark.parametrize("options", [{}, {"limit": 3}, {"descending": True, "limit": 2}, {"after": "1", "limit": 5}])
@pytest.mark.parametrize("change", ["add", "remove"])
def test_a_scan_misses_nothing_that_came_or_went_meanwhile(backend, options, change):
    """Each of two transactions counts what the other changes: at least one must see the other's work."""
    put(backend, {"a/1": 1, "a/2": 2, "a/4": 4})

    def first(transaction, meanwhile):
        seen = [key for key, _ in transaction.scan("a/", **options)]
        meanwhile()
        transaction.put("mine", seen)

    def second(transaction):
        transaction.put("theirs", transaction.get("mine"))
        if change == "add":
            transaction.put("a/3", 3)
        else:
            transaction.delete("a/2")

    interleaved(backend, first, second)
    after_both = keys(backend, "a/", **options)
    if get(backend, "theirs") is None:  # the second came first
        assert get(backend, "mine") == after_both
    else:
        assert get(backend, "theirs") == get(backend, "mine") != after_both


def test_a_record_read_twice_is_the_same_twice(backend):
    def first(transaction, meanwhile):
        once = transaction.get("a")
        meanwhile()
        transaction.put("both", [once, transaction.get("a")])

    put(backend, {"a": 0})
    interleaved(backend, first, lambda transaction: transaction.put("a", 1))
    once, again = get(backend, "both")
    assert once == again


def test_records_that_change_together_are_read_together(backend):
    def first(transaction, meanwhile):
        left = transaction.get("left")
        meanwhile()
        return left, transaction.get("right")

    def second(transaction):
        transaction.put("left", 1)
        transaction.put("right", 1)

    put(backend, {"left": 0, "right": 0})
    left, right = interleaved(backend, first, second)
    assert left == right


def test_a_failure_over_a_mixture_of_two_moments_is_none(backend):
    def first(transaction, meanwhile):
        left = transaction.get("left")
        meanwhile()
        if left != transaction.get("right"):
            raise Conflict("they differ")
        transaction.put("seen", left)

    def second(transaction):
        transaction.put("left", 1)
        transaction.put("right", 1)

    put(backend, {"left": 0, "right": 0})
    interleaved(backend, first, second)
    assert get(backend, "seen") in (0, 1)


def test_threads_share_a_backend(backend):
    def work():
        for _ in range(20):
            backend.write(lambda transaction: transaction.put("count", (transaction.get("count") or 0) + 1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert get(backend, "count") == 80


# the store as a whole


def test_everything_survives_reopening(backend, url, clock):
    put(backend, {"a/1": {"n": 1}, "a/2": {"n": 2}})
    delete(backend, "a/1")
    backend.close()
    again = Store.open(url, clock=clock)
    assert scan(again.backend, "a/") == [("2", {"n": 2})]
    again.close()


def test_a_closed_store_does_not_answer(backend):
    backend.ping()
    backend.close()
    for act in (backend.ping, lambda: put(backend, {"a": 1}), lambda: get(backend, "a")):
        with pytest.raises(StoreUnavailable, match="closed"):
            act()


def test_time_is_the_stores_own_and_stands_in_a_transaction(backend, clock):
    def work(transaction):
        before = transaction.now
        clock.now += 1
        return before, transaction.now

    assert backend.write(work) == (1000.0, 1000.0)
    with backend.view() as view:
        assert view.now == 1001.0


def test_without_a_clock_of_ours_it_is_about_now(url):
    store = Store.open(url)
    with store.backend.view() as view:
        assert abs(view.now - time.time()) < 5
    store.close()


def test_scrubbing_leaves_what_is_there(backend):
    put(backend, {"a/1": 1, "a/2": 2})
    delete(backend, "a/1")
    backend.scrub()
    assert scan(backend, "a/") == [("2", 2)]
