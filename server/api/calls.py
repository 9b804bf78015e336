"""One call's work in the engine: its choices, from submission to the last token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from prefix_store.errors import GenerationFailed, ShuttingDown
from server.api import outbox
from server.scheduler.messages import FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from server.text import TextStream

if TYPE_CHECKING:
    from server.engine.loop import EngineLoop


@dataclass(frozen=True)
class Delta:
    """What one choice gained: text, and the logprobs of the tokens that came with it, when they were asked for."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass
class Choice:
    """One choice as it grows: text that is certain, tokens used for it, and why it ended.

    `echo` is what its text begins with, and comes with its first event, as the echo's logprobs do. `end_logprob` is
    that of the token that ended it, which is none of its tokens.
    """

    index: int
    stream: TextStream
    echo: str = ""
    text: str = ""
    tokens: int = 0
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end_logprob: TokenLogprob | None = None

    def take(self, event: TokenEvent) -> str:
        """Applies an event and returns the text that became certain. Tokens behind a stop string do not count."""
        pieces = []
        echo, self.echo = self.echo, ""
        for token_id in event.token_ids:
            pieces.append(self.stream.push(token_id))
            self.tokens += 1
            if self.stream.stopped:
                break
        if event.finish_reason is not None:
            pieces.append(self.stream.finish())
        self.finish_reason = FinishReason.STOP if self.stream.stopped else event.finish_reason
        self.end_logprob = event.end_logprob
        self.text += (piece := echo + "".join(pieces))
        self.logprobs += (*(event.prompt_logprobs or ()), *event.logprobs[: len(pieces)])
        return piece


def _text_stream(tokenizer: Any, request: GenerationRequest) -> TextStream:
    return TextStream(tokenizer, request.prompt_ids, request.params.stop, request.params.min_tokens)


class Call:
    """The choices of a call in the engine, `each` to a request: more than one are the best that its beams find.

    Who submits it sees to `abort` when done with it.
    """

    def __init__(
        self,
        loop: EngineLoop,
        requests: Sequence[GenerationRequest],
        tokenizer: Any,
        clock: Callable[[], float],
        echoes: Sequence[str] | None = None,
        each: int = 1,
    ) -> None:
        """`echoes`: what the text of each choice begins with, if with anything."""
        self._loop = loop
        self._requests = requests
        self._clock = clock
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        begins = echoes or [""] * (each * len(requests))
        self._by_id = {
            request.id: [
                Choice(index, _text_stream(tokenizer, request), begins[index])
                for index in range(place * each, (place + 1) * each)
            ]
            for place, request in enumerate(requests)
        }
        self._open = each * len(requests)  # choices without a finish reason
        self.first_token_at: float | None = None
        self.ended_at: float | None = None

    @property
    def choices(self) -> list[Choice]:
        """In order of index."""
        return list(chain.from_iterable(self._by_id.values()))

    @property
    def rows(self) -> int:
        """Rows that all of it takes of a step."""
        return sum(request.params.num_beams for request in self._requests)

    @property
    def tokens(self) -> int:
        """Tokens generated for all choices."""
        return sum(choice.tokens for choice in self.choices)

    @property
    def has_ended(self) -> bool:
        """Whether every choice has a finish reason."""
        return self._open == 0

    def submit(self) -> None:
        """Queues all choices or none. Raises what the engine raises for a request that it cannot take."""
        sink = outbox.sink(self._events)
        try:
            for request in self._requests:
                self._loop.submit(request, sink)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Ends in the engine what has not ended; harmless when all has."""
        for request_id, choices in self._by_id.items():
            if any(choice.finish_reason is None for choice in choices):
                self._loop.abort(request_id)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What the choices gain, as it comes, until all have ended. Raises GenerationFailed, ShuttingDown."""
        while not self.has_ended:
            event = await self._events.get()
            choices = self._by_id[event.request_id]
            for choice, own in zip(choices, _by_choice(event, len(choices)), strict=True):
                if choice.finish_reason is None:
                    yield self._apply(choice, own)

    async def finish(self) -> None:
        """Waits until all choices have ended. Raises GenerationFailed, ShuttingDown."""
        async for _ in self.deltas():
            pass

    def _apply(self, choice: Choice, event: TokenEvent) -> Delta:
        if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise event.error or GenerationFailed("the request was aborted")
        if event.finish_reason is FinishReason.SHUTDOWN:
            raise ShuttingDown()
        if event.token_ids and self.first_token_at is None:
            self.first_token_at = self._clock()
        known = len(choice.logprobs)
        text = choice.take(event)
        if choice.stream.stopped and event.finish_reason is None:
            self._loop.abort(event.request_id)
        self._open -= choice.finish_reason is not None
        if self.has_ended:
            self.ended_at = self._clock()
        return Delta(choice.index, text, choice.finish_reason, tuple(choice.logprobs[known:]))


def _by_choice(event: TokenEvent, choices: int) -> list[TokenEvent]:
    """An event for each choice: of the best hypotheses, if there are any, as if each had been a request of its own."""
    best = [
        replace(
            event,
            token_ids=found.token_ids,
            finish_reason=found.finish_reason,
            logprobs=found.logprobs,
            end_logprob=found.end_logprob,
            hypotheses=(),
        )
        for found in event.hypotheses[:choices]
    ]
    return best + [event] * (choices - len(best))
