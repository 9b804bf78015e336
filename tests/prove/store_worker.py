"""One of several processes that work on one store: `python -m … URL WORKER COUNT`. Imports no torch.

Prints one JSON line: what it did and what the store answered, for `concurrent_store` to add up.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from prefix_store import holds, job_records
from prefix_store.backends.base import Backend
from prefix_store.backends.redis import RedisBackend
from prefix_store.backends.sqlite import SqliteBackend
from prefix_store.catalog import Catalog
from prefix_store.errors import AntefixError, StoreUnavailable
from prefix_store.geometry import ModelGeometry
from prefix_store.job_queue import JobQueue
from prefix_store.jobs import JobStatus, TrainingJob, TrainingSpec
from prefix_store.name_records import Draft
from prefix_store.prefix import Method, PrefixManifest, PrefixRef, PrefixVersion

MANIFEST = PrefixManifest(Method.PREFIX, ModelGeometry("llama", 2, 4, 2, 3, 12), 5, position_offset=5)
SPEC = TrainingSpec(data_digest="d" * 64, examples=3)
TENANT, NAMES, COUNTER = "acme", ("a", "b"), "counter"
READERS = ("other", "third", "*")


def open_backend(url: str) -> Backend:
    """Without the rest of the store, which needs torch."""
    path = url.removeprefix("sqlite:///")
    return RedisBackend(url) if path == url else SqliteBackend(Path(path))


class Worker:
    """Draws one deed after another and keeps the books."""

    def __init__(self, backend: Backend, name: str) -> None:
        self._backend, self._name = backend, name
        self._catalog, self._queue = Catalog(backend), JobQueue(backend)
        self._draws = random.Random(name)
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.book: dict[str, list[Any]] = defaultdict(list)

    def work(self, count: int) -> None:
        """So many deeds, refused or not."""
        deeds = {
            self.publish: 30, self.edit: 14, self.set_alias: 10, self.make_current: 10, self.delete: 8,
            self.share: 6, self.enqueue: 10, self.train: 12,
        }  # fmt: skip
        for number in range(count):
            (deed,) = self._draws.choices(list(deeds), list(deeds.values()))
            try:
                deed(number)
                self.done[deed.__name__] += 1
            except StoreUnavailable as error:
                self.book["unavailable"].append(f"{deed.__name__}: {error.message}")
            except AntefixError as error:
                self.refused[f"{deed.__name__}: {error.code}"] += 1

    def publish(self, number: int) -> None:
        """A new version under a name that all share."""
        name = self._draws.choice(NAMES)
        version = publish(self._backend, name, f"{self._name}/{number}")
        self.book["published"].append([name, version.version, version.digest])

    def edit(self, number: int) -> None:
        """One more on a count that all share."""
        self._catalog.edit(PrefixRef(TENANT, COUNTER, 1), _count_on, self._name)

    def set_alias(self, number: int) -> None:
        """The alias of this worker's own, which nobody else moves."""
        name, target = self._one_of_all()
        self._catalog.set_alias(TENANT, name, self._name, target, self._name)
        self.book["aliased"].append([name, target])

    def make_current(self, number: int) -> None:
        """What the bare name means."""
        self._catalog.make_current(TENANT, *self._one_of_all(), self._name)

    def delete(self, number: int) -> None:
        """One version, if nobody else was quicker and it has no alias."""
        ref = PrefixRef(TENANT, *self._one_of_all())
        for version in self._catalog.delete(ref, None, self._name):
            self.book["deleted"].append([version.name, version.version])

    def _one_of_all(self) -> tuple[str, int]:
        """A name and a number up to the last that this worker was given."""
        name = self._draws.choice(NAMES)
        return name, self._draws.randint(1, max([1, *(last for one, last, _ in self.book["published"] if one == name)]))

    def share(self, number: int) -> None:
        """Other readers of a name."""
        readers = self._draws.sample(READERS, self._draws.randint(0, 2))
        self._catalog.share(TENANT, self._draws.choice(NAMES), readers, self._name)

    def enqueue(self, number: int) -> None:
        """A job."""
        job_id = f"ftjob-{self._name}-{number}"
        self._backend.write(
            lambda transaction: job_records.add(
                transaction,
                TrainingJob(job_id, TENANT, "trained", SPEC, JobStatus.QUEUED, created_at=transaction.now),
            )
        )
        self.book["enqueued"].append(job_id)

    def train(self, number: int) -> None:
        """Takes a job, reports on it and publishes its result, fails it or hands it back."""
        job = self._queue.claim(self._name, 3600.0)
        if job is None:
            return
        self.book["claimed"].append([job.id, job.fence])
        self._queue.add_event(job, "message", {})
        self._queue.heartbeat(job, 3600.0, {"step": number})
        end = self._draws.choice(("publish", JobStatus.FAILED, JobStatus.QUEUED))
        if end == "publish":
            version = publish(self._backend, "trained", f"{self._name}/{number}", job)
            self.book["published"].append(["trained", version.version, version.digest])
        else:
            self._queue.finish(job, end, None)
        self.book["ended"].append([job.id, str(end)])


def publish(backend: Backend, name: str, content: str, job: TrainingJob | None = None) -> PrefixVersion:
    """A version's records, without its file."""
    digest = hashlib.sha256(content.encode()).hexdigest()
    with holds.held(backend, TENANT, digest) as hold:
        return Catalog(backend).publish(TENANT, name, Draft(MANIFEST, digest, 10, hold), job, None, "w")


def _count_on(version: PrefixVersion, now: float) -> PrefixVersion:
    return dataclasses.replace(version, metadata={"count": str(int(version.metadata.get("count", "0")) + 1)})


def main(url: str, name: str, count: str) -> None:
    """Works and reports."""
    backend = open_backend(url)
    worker = Worker(backend, name)
    worker.work(int(count))
    backend.close()
    print(json.dumps({"done": worker.done, "refused": worker.refused, "book": worker.book}))


if __name__ == "__main__":
    main(*sys.argv[1:])
