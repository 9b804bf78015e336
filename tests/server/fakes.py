"""An engine loop without an engine: its answers are known beforehand and come from a thread, as the real one's do."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from prefix_store.errors import AntefixError, GenerationFailed
from prefix_store.jobs import JobStatus
from server.engine.loop import NONE, EngineStats
from server.engine.prefix_loader import HostStats
from server.exposition import StoreNumbers
from server.metrics import Metrics
from server.scheduler.messages import FinishReason, GenerationRequest, PrefixPayload, TokenEvent, TokenLogprob
from server.scheduler.preloads import Preloads

FREE_BYTES = 5 << 30
END = 1  # the token that an answer ends with
Answer = Callable[[GenerationRequest], list[int]]


def stats(**numbers: Any) -> EngineStats:
    """All zero but what is given."""
    needed = [field.name for field in dataclasses.fields(EngineStats) if field.default is dataclasses.MISSING]
    needed = [name for name in needed if not name.endswith("_of")]
    return EngineStats(**{**dict.fromkeys(needed, 0), **numbers})


def host_stats(**numbers: Any) -> HostStats:
    """All zero but what is given."""
    zero = {field.name: 0 for field in dataclasses.fields(HostStats)}
    return HostStats(**{**zero, "loads": NONE, **numbers})


def metrics(
    engine: Callable[[], object] = stats,
    jobs: Callable[[], dict[JobStatus, int]] = dict,
    overdue: Callable[[], int] = lambda: 0,
    **more: Any,
) -> Metrics:
    """Of a server in which nothing happens but what is given."""

    def store() -> StoreNumbers | None:
        try:
            return StoreNumbers(jobs(), overdue(), FREE_BYTES)
        except AntefixError:
            return None

    return Metrics(engine, more.pop("host", host_stats), store, **more)


@dataclass
class FakeLoop:
    """Answers each request with `answer(request)`, a token an event; `hold` makes it wait until it is set."""

    answer: Answer
    hold: threading.Event = field(default_factory=threading.Event)
    refusal: Exception | None = None
    failure: GenerationFailed | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    preloads: Preloads = field(default_factory=lambda: Preloads(64))
    most_waiting: int = 1024

    def __post_init__(self) -> None:
        self.hold.set()
        self.stopped = self.has_failed = False

    @property
    def is_alive(self) -> bool:
        return not self.stopped

    def submit(self, request: GenerationRequest, on_event: Callable[[TokenEvent], None]) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        threading.Thread(target=self._run, args=(request, on_event), daemon=True).start()

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def preload(self, payload: PrefixPayload, holder: Hashable) -> Future[None]:
        self.preloads.add(payload, holder)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def release(self, digest: str, holder: Hashable) -> None:
        self.preloads.remove(digest, holder)

    def preloaded(self) -> dict[str, frozenset[Hashable]]:
        return self.preloads.holders()

    def stats(self) -> EngineStats:
        return stats(running=len(self.requests))

    def stop(self) -> None:
        self.stopped = True
        self.hold.set()

    def _run(self, request: GenerationRequest, on_event: Callable[[TokenEvent], None]) -> None:
        ids = self.answer(request)
        asked = request.params.max_tokens
        for index, token_id in enumerate(ids[:asked]):
            last = index + 1 == asked
            on_event(
                TokenEvent(
                    request.id,
                    (token_id,),
                    FinishReason.LENGTH if last else None,
                    _logprobs(request, token_id),
                    _prompt_logprobs(request) if index == 0 else None,
                )
            )
            self.hold.wait(10)
            if request.id in self.aborted:
                return
        if self.failure is not None:
            on_event(TokenEvent(request.id, finish_reason=FinishReason.ERROR, error=self.failure))
        elif asked == 0:
            on_event(TokenEvent(request.id, (), FinishReason.LENGTH, (), _prompt_logprobs(request)))
        elif len(ids) < asked:
            ended = TokenLogprob(END, -0.25) if request.params.logprobs is not None else None
            prompt = None if ids else _prompt_logprobs(request)
            stop = FinishReason.STOP
            on_event(TokenEvent(request.id, finish_reason=stop, prompt_logprobs=prompt, end_logprob=ended))


def _logprobs(request: GenerationRequest, token_id: int) -> tuple[TokenLogprob, ...]:
    if request.params.logprobs is None:
        return ()
    return (TokenLogprob(token_id, -0.5, ((token_id, -0.5), (token_id + 1, -1.5))[: request.params.logprobs]),)


def _prompt_logprobs(request: GenerationRequest) -> tuple[TokenLogprob, ...] | None:
    if request.params.logprobs is None or not request.params.echo:
        return None
    first, *rest = request.prompt_ids
    return (TokenLogprob(first, None), *(TokenLogprob(token_id, -1.0) for token_id in rest))
