import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from prefix_store.errors import GenerationFailed, Overloaded
from prefix_store.model.frozen import FrozenModel
from server.api.calls import Call
from server.scheduler.messages import FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from server.scheduler.sampling_params import SamplingParams

Sink = Callable[[TokenEvent], None]


class Script:
    """A loop that delivers what it is told to, from a thread, once a request has been submitted."""

    def __init__(self, *events: TokenEvent, refuse: str | None = None) -> None:
        self._events = events
        self._refuse = refuse
        self.aborted: list[str] = []

    def submit(self, request: GenerationRequest, on_event: Sink) -> None:
        if request.id == self._refuse:
            raise Overloaded("full")
        mine = [event for event in self._events if event.request_id == request.id]
        threading.Thread(target=lambda: [on_event(event) for event in mine]).start()

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


def call(frozen: FrozenModel, loop: Script, ids: str = "a", **params: Any) -> Call:
    requests = [GenerationRequest(name, "t", (2,), SamplingParams(**params)) for name in ids]
    return Call(loop, requests, frozen.tokenizer, time.monotonic)


def tokens(frozen: FrozenModel, text: str) -> tuple[int, ...]:
    return tuple(frozen.tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.anyio
async def test_an_event_may_bring_several_tokens_and_the_end_at_once(frozen: FrozenModel) -> None:
    made = call(frozen, Script(TokenEvent("a", tokens(frozen, "hé"), FinishReason.LENGTH)))
    made.submit()
    (delta,) = [delta async for delta in made.deltas()]
    assert (delta.text, delta.finish_reason, made.tokens) == ("hé", FinishReason.LENGTH, 3)
    assert made.has_ended
    assert made.first_token_at is not None
    assert made.ended_at is not None


@pytest.mark.anyio
async def test_tokens_after_a_stop_string_do_not_count_and_late_events_are_passed_over(frozen: FrozenModel) -> None:
    late = TokenEvent("a", tokens(frozen, "zz"))
    loop = Script(TokenEvent("a", tokens(frozen, "hi!?")), late, TokenEvent("b", (), FinishReason.STOP))
    made = call(frozen, loop, "ab", stop=("!",))
    made.submit()
    await made.finish()
    first, second = made.choices
    assert (first.text, first.tokens, first.finish_reason) == ("hi", 3, FinishReason.STOP)
    assert (second.text, second.tokens, second.finish_reason) == ("", 0, FinishReason.STOP)
    assert loop.aborted == ["a"]


@pytest.mark.anyio
async def test_the_token_that_ends_a_choice_is_none_of_its_own(frozen: FrozenModel) -> None:
    (letter,), end = tokens(frozen, "h"), TokenLogprob(1, -2.0)
    first = TokenEvent("a", (letter,), logprobs=(TokenLogprob(letter, -1.0),))
    made = call(frozen, Script(first, TokenEvent("a", (), FinishReason.STOP, end_logprob=end)), logprobs=0)
    made.submit()
    await made.finish()
    (choice,) = made.choices
    assert (choice.logprobs, choice.end_logprob) == ([TokenLogprob(letter, -1.0)], end)


@pytest.mark.anyio
async def test_when_one_is_refused_all_are_ended(frozen: FrozenModel) -> None:
    loop = Script(refuse="b")
    with pytest.raises(Overloaded):
        call(frozen, loop, "ab").submit()
    assert "a" in loop.aborted


@pytest.mark.anyio
@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
async def test_an_end_that_nobody_asked_for_is_a_failure(frozen: FrozenModel, reason: FinishReason) -> None:
    made = call(frozen, Script(TokenEvent("a", finish_reason=reason, error=GenerationFailed("why"))))
    made.submit()
    with pytest.raises(GenerationFailed, match="why"):
        await made.finish()


@pytest.mark.anyio
async def test_a_timeout_keeps_what_there_is(frozen: FrozenModel) -> None:
    made = call(frozen, Script(TokenEvent("a", tokens(frozen, "h")), TokenEvent("a", (), FinishReason.TIMEOUT)))
    made.submit()
    await made.finish()
    assert (made.choices[0].text, made.choices[0].finish_reason) == ("h", FinishReason.TIMEOUT)
