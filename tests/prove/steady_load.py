"""A steady load for the proof of faults: clients that ask and judge every answer, and one that keeps publishing.

An answer is right if it is what the server said to the same request when it had nothing else to do. A failure is clear
if a client can tell that it may ask again: a connection that is refused or closed, a 503 with `Retry-After`, or the
same as the last event of a stream.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from prefix_store import codec
from tests.bench.results import percentile

PAUSE_SECONDS = 1.0  # before a client asks again for what has failed, as Retry-After says
UPLOAD_SECONDS = 0.5
AGAIN = ("shutting_down", "store_unavailable", "loading")  # codes of a stream's error that may be asked again
SHORT, LONG = 16, 80
LONG_EVERY = 4  # of so many clients one asks for long streams, for the gaps between their tokens
PREFIXES = ("plays", "factbook", "carroll", "tables", None)
PROMPTS = ("The king", "It is said that in the north of the country there was once a man who")
Wanted = tuple[str | None, str, int]
Expected = dict[Wanted, str]
ALL: tuple[Wanted, ...] = (
    *((prefix, prompt, SHORT) for prefix in PREFIXES for prompt in PROMPTS),
    *((prefix, PROMPTS[0], LONG) for prefix in PREFIXES[:2]),
)


@dataclass(frozen=True)
class Failure:
    """What a client met instead of an answer."""

    kind: str
    is_clear: bool


def body(prefix: str | None, prompt: str, tokens: int) -> dict[str, Any]:
    """Greedy, so that the same request has the same answer."""
    return {"prefix_id": prefix, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def learn(client: httpx.Client, wanted: Sequence[Wanted]) -> Expected:
    """Asks every request alone."""
    return {each: client.post("/generate", json=body(*each)).raise_for_status().json()["text"] for each in wanted}


@dataclass
class Load:
    """What the clients and the publisher have met; times are `time.monotonic`'s."""

    url: str
    expected: Expected
    files: list[bytes]
    right: list[tuple[float, float]] = field(default_factory=list)  # when asked, when answered
    failed: list[tuple[float, Failure]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)  # when, and seconds since the token before
    published: dict[str, str] = field(default_factory=dict)  # what was acknowledged: name -> digest
    refused: list[tuple[float, Failure]] = field(default_factory=list)  # of the publisher
    _stopped: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self, clients: int) -> Iterator[None]:
        """Asks for as long as the block runs; a bug in a client fails it."""
        bugs: list[BaseException] = []

        def guarded(work: Any, *arguments: Any) -> None:
            try:
                work(*arguments)
            except BaseException as error:
                bugs.append(error)

        threads = [threading.Thread(target=guarded, args=(self._ask_on, number)) for number in range(clients)]
        threads.append(threading.Thread(target=guarded, args=(self._publish_on,)))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            for thread in threads:
                thread.join()
        if bugs:
            raise bugs[0]

    def worst_gap(self, since: float, until: float) -> float:
        """The longest time between two tokens of one stream, of those that came in between."""
        return max((gap for at, gap in self.gaps if since <= at <= until), default=0.0)

    def gap_percentile(self, percent: float, since: float, until: float) -> float:
        """As `worst_gap`."""
        return percentile([gap for at, gap in self.gaps if since <= at <= until] or [0.0], percent)

    def first_right(self, since: float) -> float | None:
        """When the first right answer came to what was asked after a moment."""
        return min((answered for asked, answered in self.right if asked >= since), default=None)

    def failures(self, since: float = 0.0) -> dict[str, int]:
        """How many requests failed, by kind."""
        return dict(Counter(failure.kind for at, failure in self.failed if at >= since))

    def unclear(self) -> list[str]:
        """Failures after which a client would not know what to do."""
        return [failure.kind for _, failure in self.failed + self.refused if not failure.is_clear]

    def lost(self, client: httpx.Client) -> list[str]:
        """What was acknowledged and is not there, or is not what it was."""
        found = []
        for name, digest in self.published.items():
            reply = client.get(f"/v1/prefixes/{name}/export")
            if reply.status_code != 200 or codec.digest_of(reply.content) != digest:
                found.append(f"{name}: {reply.status_code}")
        return found

    def _ask_on(self, number: int) -> None:
        draws = random.Random(number)
        is_long = number % LONG_EVERY == 0
        wanted = [each for each in self.expected if (each[2] == LONG) == is_long]
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self._stopped.is_set():
                each = draws.choice(wanted)
                asked = time.monotonic()
                found = self._stream(client, each) if is_long or draws.random() < 0.5 else self._whole(client, each)
                now = time.monotonic()
                if isinstance(found, Failure):
                    self.failed.append((now, found))
                    self._stopped.wait(PAUSE_SECONDS)
                elif found == self.expected[each]:
                    self.right.append((asked, now))
                else:
                    self.wrong.append(f"{each}: {found[:200]!r}")

    def _whole(self, client: httpx.Client, each: Wanted) -> str | Failure:
        try:
            reply = client.post("/generate", json=body(*each))
        except httpx.TransportError as error:
            return _closed(error)
        return reply.json()["text"] if reply.status_code == 200 else _refusal(reply)

    def _stream(self, client: httpx.Client, each: Wanted) -> str | Failure:
        text, last = "", None
        try:
            with client.stream("POST", "/generate", json={**body(*each), "stream": True}) as reply:
                if reply.status_code != 200:
                    reply.read()
                    return _refusal(reply)
                for line in reply.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    now, event = time.monotonic(), json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return Failure(event["error"]["code"], event["error"]["code"] in AGAIN)
                    if last is not None:
                        self.gaps.append((now, now - last))
                    last = now
                    text += event["text"]
        except httpx.TransportError as error:
            return _closed(error)
        return text

    def _publish_on(self) -> None:
        with httpx.Client(base_url=self.url, timeout=120) as client:
            number = len(self.published)
            while not self._stopped.wait(UPLOAD_SECONDS):
                name, file = f"kept-{id(self)}-{number}", self.files[number % len(self.files)]
                number += 1
                try:
                    reply = client.post("/v1/prefixes", data={"id": name}, files={"file": ("f", file)})
                except httpx.TransportError as error:
                    self.refused.append((time.monotonic(), _closed(error)))
                    continue
                if reply.status_code == 201:
                    self.published[name] = reply.json()["digest"]
                else:
                    self.refused.append((time.monotonic(), _refusal(reply)))


def _closed(error: httpx.TransportError) -> Failure:
    is_refused = isinstance(error, httpx.ConnectError)
    is_clear = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)  # not: a time that ran out
    return Failure("connection refused" if is_refused else "connection closed" if is_clear else repr(error), is_clear)


def _refusal(reply: httpx.Response) -> Failure:
    is_clear = reply.status_code == 503 and "retry-after" in reply.headers
    return Failure(reply.json()["error"]["code"] if is_clear else f"{reply.status_code} {reply.text[:300]}", is_clear)
