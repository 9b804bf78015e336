import threading

import pytest
import structlog

from prefix_store.errors import NotFound, StoreUnavailable
from server.api import recent
from server.api.recent import GOOD_SECONDS, PATIENCE_SECONDS, PAUSE_SECONDS, Recent
from tests.prefix_store.samples import Clock


class Source:
    """A store that answers with a number, or with what it is told to raise."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.asked = 0

    def __call__(self) -> int:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.asked


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def used() -> list[str]:
    return []


@pytest.fixture
def memory(clock: Clock, used: list[str]) -> Recent:
    return Recent(used.append, clock)


@pytest.fixture
def source() -> Source:
    return Source()


AWAY = StoreUnavailable("away")


def test_while_the_store_answers_it_is_always_asked(memory: Recent, source: Source, used: list[str]) -> None:
    assert [memory.ask("prefix", "a", source) for _ in range(3)] == [1, 2, 3]
    assert used == []


def test_while_it_is_away_its_last_answer_stands(memory: Recent, source: Source, used: list[str]) -> None:
    memory.ask("prefix", "a", source)
    assert memory.ask("prefix", "a", source) == 2
    source.error = AWAY
    assert memory.ask("prefix", "a", source) == 2
    assert used == ["prefix"]
    for what, key in (("prefix", "b"), ("key", "a")):
        with pytest.raises(StoreUnavailable):
            memory.ask(what, key, source)


def test_not_for_ever(memory: Recent, source: Source, clock: Clock) -> None:
    memory.ask("prefix", "a", source)
    source.error = AWAY
    clock.now += GOOD_SECONDS - 0.1
    assert memory.ask("prefix", "a", source) == 1
    clock.now += 0.1
    with pytest.raises(StoreUnavailable):
        memory.ask("prefix", "a", source)


def test_using_an_answer_does_not_make_it_last(memory: Recent, source: Source, clock: Clock) -> None:
    memory.ask("prefix", "a", source)
    source.error = AWAY
    for _ in range(int(GOOD_SECONDS / 10) - 1):
        clock.now += 10
        memory.ask("prefix", "a", source)
    clock.now += 10
    with pytest.raises(StoreUnavailable):
        memory.ask("prefix", "a", source)


def test_what_is_no_longer_good_is_not_used(memory: Recent, source: Source) -> None:
    memory.ask("key", "a", source)
    source.error = AWAY
    with pytest.raises(StoreUnavailable):
        memory.ask("key", "a", source, is_good=lambda answer: answer != 1)


def test_a_refusal_is_an_answer(memory: Recent, source: Source) -> None:
    memory.ask("prefix", "a", source)
    source.error = NotFound("deleted")
    with pytest.raises(NotFound):
        memory.ask("prefix", "a", source)
    source.error = AWAY
    with pytest.raises(StoreUnavailable):
        memory.ask("prefix", "a", source)


def test_what_was_changed_is_forgotten_also_where_the_answer_was_on_its_way(memory: Recent, clock: Clock) -> None:
    def slow() -> str:
        clock.now += 1
        memory.forget(lambda place, answer: place == ("prefix", "a"))
        return "old"

    def away() -> str:
        raise AWAY

    memory.ask("prefix", "b", lambda: "kept")
    assert memory.ask("prefix", "a", slow) == "old"
    with pytest.raises(StoreUnavailable):
        memory.ask("prefix", "a", away)
    assert memory.ask("prefix", "b", away) == "kept"


def test_a_store_that_is_away_is_asked_now_and_then_and_by_one(memory: Recent, source: Source, clock: Clock) -> None:
    memory.ask("prefix", "a", source)
    source.error = AWAY
    for _ in range(5):
        memory.ask("prefix", "a", source)
    assert source.asked == 2
    clock.now += PAUSE_SECONDS

    def hang() -> int:
        """The one that asks waits; the others do not wait with it."""
        for _ in range(5):
            assert memory.ask("prefix", "a", source) == 1
        raise AWAY

    assert memory.ask("prefix", "a", hang) == 1
    assert source.asked == 2
    assert PATIENCE_SECONDS > 10  # what a request to Redis may take


def test_once_it_is_back_it_is_asked_again(memory: Recent, source: Source, clock: Clock) -> None:
    memory.ask("prefix", "a", source)
    source.error = AWAY
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            memory.ask("prefix", "a", source)
        source.error = None
        clock.now += PAUSE_SECONDS
        assert memory.ask("prefix", "a", source) == 3
        assert memory.ask("prefix", "a", source) == 4
    assert [log["event"].partition(";")[0] for log in logs] == ["the store is away", "the store is back"]


def test_memory_is_bounded(memory: Recent, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "MOST", 3)
    for key in "abcad":
        memory.ask("prefix", key, source)
    source.error = AWAY
    assert [memory.ask("prefix", key, source) for key in "acd"] == [4, 3, 5]
    with pytest.raises(StoreUnavailable):
        memory.ask("prefix", "b", source)


def test_threads_share_it(source: Source) -> None:
    memory = Recent()
    memory.ask("prefix", 0, source)

    def work(number: int) -> None:
        for index in range(200):
            memory.ask("prefix", (number, index % 7), source)
            memory.forget(lambda place, _: place[1] == (number, 3))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    source.error = AWAY
    assert memory.ask("prefix", 0, source) == 1
