from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest
import structlog

from prefix_store.errors import NotFound, StoreUnavailable
from server.api import recent
from server.api.recent import FEW, GOOD_SECONDS, MANY, PAUSE_SECONDS, Recent
from tests.prefix_store.samples import Clock

pytestmark = pytest.mark.anyio


class Source:
    """A store that answers with a number, or with what it is told to raise; while `goes_on` is not set it hangs."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.asked = 0
        self.goes_on = threading.Event()
        self.goes_on.set()

    def __call__(self) -> int:
        self.asked += 1
        number = self.asked
        assert self.goes_on.wait(20)
        if self.error is not None:
            raise self.error
        return number


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
async def source(anyio_backend: str) -> AsyncIterator[Source]:
    made = Source()
    yield made
    made.goes_on.set()


AWAY = StoreUnavailable("away")


async def settled(memory: Recent) -> None:
    """Once no question is on its way."""
    while memory._many.asked | memory._few.asked:
        await asyncio.sleep(0.001)


async def test_while_the_store_answers_it_is_always_asked(memory: Recent, source: Source, used: list[str]) -> None:
    assert [await memory.ask("prefix", "a", source) for _ in range(3)] == [1, 2, 3]
    assert used == []


async def test_while_it_is_away_its_last_answer_stands(memory: Recent, source: Source, used: list[str]) -> None:
    await memory.ask("prefix", "a", source)
    assert await memory.ask("prefix", "a", source) == 2
    source.error = AWAY
    assert await memory.ask("prefix", "a", source) == 2
    assert used == ["prefix"]
    for what, key in (("prefix", "b"), ("key", "a")):
        with pytest.raises(StoreUnavailable):
            await memory.ask(what, key, source)


async def test_not_for_ever(memory: Recent, source: Source, clock: Clock) -> None:
    await memory.ask("prefix", "a", source)
    source.error = AWAY
    clock.now += GOOD_SECONDS - 0.1
    assert await memory.ask("prefix", "a", source) == 1
    clock.now += 0.1
    with pytest.raises(StoreUnavailable):
        await memory.ask("prefix", "a", source)


async def test_using_an_answer_does_not_make_it_last(memory: Recent, source: Source, clock: Clock) -> None:
    await memory.ask("prefix", "a", source)
    source.error = AWAY
    for _ in range(int(GOOD_SECONDS / 10) - 1):
        clock.now += 10
        await memory.ask("prefix", "a", source)
        await settled(memory)
    clock.now += 10
    with pytest.raises(StoreUnavailable):
        await memory.ask("prefix", "a", source)


async def test_what_is_no_longer_good_is_not_used(memory: Recent, source: Source) -> None:
    await memory.ask("key", "a", source)
    source.error = AWAY
    with pytest.raises(StoreUnavailable):
        await memory.ask("key", "a", source, is_good=lambda answer: answer != 1)


async def test_a_refusal_is_an_answer(memory: Recent, source: Source) -> None:
    await memory.ask("prefix", "a", source)
    source.error = NotFound("deleted")
    with pytest.raises(NotFound):
        await memory.ask("prefix", "a", source)
    source.error = AWAY
    with pytest.raises(StoreUnavailable):
        await memory.ask("prefix", "a", source)


async def test_a_refusal_that_nobody_waited_for_is_one_too(memory: Recent, source: Source, clock: Clock) -> None:
    await memory.ask("key", "a", source)
    source.error = AWAY
    await memory.ask("key", "a", source)
    source.error = NotFound("revoked")
    clock.now += PAUSE_SECONDS
    assert await memory.ask("key", "a", source) == 1
    await settled(memory)
    with pytest.raises(NotFound):
        await memory.ask("key", "a", source)


async def test_what_was_changed_is_forgotten_also_where_the_answer_was_on_its_way(memory: Recent, clock: Clock) -> None:
    def slow() -> str:
        clock.now += 1
        memory.forget(lambda place, answer: place == ("prefix", "a"))
        return "old"

    def away() -> str:
        raise AWAY

    await memory.ask("prefix", "b", lambda: "kept")
    assert await memory.ask("prefix", "a", slow) == "old"
    with pytest.raises(StoreUnavailable):
        await memory.ask("prefix", "a", away)
    assert await memory.ask("prefix", "b", away) == "kept"


async def test_a_store_that_is_away_is_asked_now_and_then_and_nobody_waits_for_it(
    memory: Recent, source: Source, clock: Clock
) -> None:
    await memory.ask("prefix", "a", source)
    source.error = AWAY
    for _ in range(5):
        await memory.ask("prefix", "a", source)
    assert source.asked == 2
    source.goes_on.clear()
    clock.now += PAUSE_SECONDS
    for _ in range(5):
        begun = time.monotonic()
        assert await memory.ask("prefix", "a", source) == 1
        assert time.monotonic() - begun < recent.PATIENCE_SECONDS / 4
        clock.now += PAUSE_SECONDS
    source.goes_on.set()
    await settled(memory)
    assert source.asked == 3, "one at a time"


async def test_once_it_is_back_it_is_asked_again(memory: Recent, source: Source, clock: Clock) -> None:
    await memory.ask("prefix", "a", source)
    source.error = AWAY
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            await memory.ask("prefix", "a", source)
        source.error = None
        clock.now += PAUSE_SECONDS
        assert await memory.ask("prefix", "a", source) == 1
        await settled(memory)
        assert await memory.ask("prefix", "a", source) == 4
    assert [log["event"].partition(";")[0] for log in logs] == ["the store is away", "the store is back"]


async def test_nobody_waits_long_for_a_store_that_hangs(
    memory: Recent, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many ask it for what is not known, what is known is answered at once, and a late answer is kept."""
    monkeypatch.setattr(recent, "PATIENCE_SECONDS", 0.3)
    await memory.ask("key", "known", source)
    source.goes_on.clear()
    begun = time.monotonic()
    strangers = [memory.ask("key", number, source) for number in range(300)]
    found = await asyncio.gather(*strangers, memory.ask("key", "known", source), return_exceptions=True)
    assert [type(one) for one in found] == [StoreUnavailable] * 300 + [int]
    assert time.monotonic() - begun < 3
    assert source.asked <= 1 + MANY + FEW, "those whom nobody waits for any more are not put"
    begun = time.monotonic()
    more = [memory.ask("key", number, source) for number in range(300)]
    assert {type(one) for one in await asyncio.gather(*more, return_exceptions=True)} == {StoreUnavailable}
    assert await memory.ask("key", "known", source) == 1
    assert time.monotonic() - begun < 3
    source.goes_on.set()
    await settled(memory)
    source.error = AWAY
    assert await memory.ask("key", 0, source) > 1


async def test_a_store_that_is_slow_is_as_good_as_away(memory: Recent, source: Source, clock: Clock) -> None:
    def slow() -> str:
        clock.now += recent.PATIENCE_SECONDS + 0.1
        return "late"

    assert await memory.ask("prefix", "a", slow) == "late"
    assert memory.is_away
    assert await memory.ask("prefix", "a", source) == "late"
    assert await memory.ask("prefix", "b", source) == 1, "what is not known is asked for, by a few at a time"
    assert not memory.is_away


async def test_what_changes_something_is_never_let_in_by_memory(memory: Recent, source: Source) -> None:
    await memory.ask("key", "a", source)
    source.error = AWAY
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await memory.ask("key", "a", source, fresh=True)
    assert await memory.ask("key", "a", source) == 1


async def test_memory_is_bounded(memory: Recent, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "MOST", 3)
    for key in "abcad":
        await memory.ask("prefix", key, source)
    source.error = AWAY
    assert [await memory.ask("prefix", key, source) for key in "acd"] == [4, 3, 5]
    with pytest.raises(StoreUnavailable):
        await memory.ask("prefix", "b", source)


async def test_many_share_it_and_other_threads_forget(source: Source) -> None:
    memory = Recent()
    await memory.ask("prefix", 0, source)
    ended = threading.Event()

    def forget() -> None:
        while not ended.is_set():
            memory.forget(lambda place, _: place[1] == (1, 3))

    forgetting = threading.Thread(target=forget)
    forgetting.start()
    try:
        await asyncio.gather(*(memory.ask("prefix", (index % 4, index % 7), source) for index in range(200)))
    finally:
        ended.set()
        forgetting.join()
    source.error = AWAY
    assert await memory.ask("prefix", 0, source) == 1
