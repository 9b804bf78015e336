import asyncio
import gc
import threading

from server.api import outbox
from server.scheduler.messages import TokenEvent


def event(name: str) -> TokenEvent:
    return TokenEvent(name, token_ids=(1,))


def in_a_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_events_of_one_step_come_in_order_at_the_price_of_one_waking():
    async def run() -> None:
        loop = asyncio.get_running_loop()
        woken, wake = [], loop.call_soon_threadsafe

        def counting(*arguments):
            woken.append(arguments)
            return wake(*arguments)

        loop.call_soon_threadsafe = counting
        queues = [asyncio.Queue() for _ in range(3)]
        sinks = [outbox.sink(queue) for queue in queues]
        for step in range(2):
            in_a_thread(
                lambda step=step: [sink(event(f"{step}{index}")) for _ in range(5) for index, sink in enumerate(sinks)]
            )
            assert len(woken) == step + 1
            await asyncio.sleep(0)
            for index, queue in enumerate(queues):
                assert [queue.get_nowait().request_id for _ in range(5)] == [f"{step}{index}"] * 5
                assert queue.empty()

    asyncio.run(run())


def test_nothing_is_lost_while_both_sides_are_busy():
    count = 20_000

    async def run() -> list[str]:
        queue: asyncio.Queue[TokenEvent] = asyncio.Queue()
        sink = outbox.sink(queue)
        thread = threading.Thread(target=lambda: [sink(event(str(number))) for number in range(count)])
        thread.start()
        return [(await asyncio.wait_for(queue.get(), 10)).request_id for _ in range(count)]

    assert asyncio.run(run()) == [str(number) for number in range(count)]


def test_a_closed_event_loop_is_passed_over_and_the_next_one_has_its_own():
    async def make():
        queue: asyncio.Queue[TokenEvent] = asyncio.Queue()
        return queue, outbox.sink(queue)

    queue, sink = asyncio.run(make())
    sink(event("late"))
    assert queue.empty()

    async def again() -> str:
        queue, sink = await make()
        in_a_thread(lambda: sink(event("next")))
        return (await asyncio.wait_for(queue.get(), 10)).request_id

    assert asyncio.run(again()) == "next"


def test_event_loops_that_are_gone_are_forgotten():
    async def make() -> None:
        outbox.sink(asyncio.Queue())

    before = len(outbox._outboxes)
    for _ in range(3):
        asyncio.run(make())
    gc.collect()
    assert len(outbox._outboxes) <= before
