"""Whether a store is whole: its database, every file, every name, and what it has counted. Changes nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prefix_store import layout, usage
from prefix_store.backends.base import View, walk
from prefix_store.errors import NoSuchFile, PrefixNotFound, StoreCorrupt
from prefix_store.files import StoredFile
from prefix_store.jobs import TrainingJob
from prefix_store.name_records import NameRecord
from prefix_store.prefix import PrefixVersion
from prefix_store.store import Store
from prefix_store.tenants import Usage

# Others may write meanwhile: what does not add up is looked at again before it is called wrong.
LOOKS, PAUSE_SECONDS = 3, 0.2


@dataclass
class Report:
    """What is wrong, and what endangers a store that is whole."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def examine(store: Store, say: Callable[[int, int], None]) -> Report:
    """Reads everything; `say` hears how many files of how many are done. Raises StoreUnavailable."""
    report = Report()
    store.ping()
    try:
        report.warnings += store.backend.examine()
    except StoreCorrupt as error:
        report.faults.append(error.message)
        return report  # what it says of the rest means nothing
    versions = [PrefixVersion.from_json(data) for _, data in walk(store.backend, "version/")]
    jobs = [TrainingJob.from_json(data) for _, data in walk(store.backend, "job/")]
    files = [StoredFile.from_json(data) for _, data in walk(store.backend, "file/")]
    total = len(versions) + len(files) + len(jobs) + sum(job.checkpoint is not None for job in jobs)
    for number, problem in enumerate(_files(store, versions, files, jobs), start=1):
        report.faults += [problem] if problem else []
        say(number, total)
    report.faults += _names(store)
    report.faults += _counts(store)
    return report


def _files(
    store: Store, versions: list[PrefixVersion], files: list[StoredFile], jobs: list[TrainingJob]
) -> Iterator[str | None]:
    """What is wrong with each file, or None."""
    for version in versions:
        try:
            with store.prefixes.file(version) as path:
                size = path.stat().st_size
            wrong = size != version.size_bytes
            yield f"{version.ref}: its file has {size} bytes, not {version.size_bytes}" if wrong else None
        except PrefixNotFound:
            yield None  # deleted since
        except StoreCorrupt as error:
            yield f"{version.ref}: {error.message}"
    for file in files:
        try:
            wrong = len(store.files.read(file)) != file.size_bytes
            yield f"{file.id}: it is not of {file.size_bytes} bytes" if wrong else None
        except NoSuchFile:
            yield None  # deleted since
        except StoreCorrupt as error:
            yield f"{file.id}: {error.message}"
    for job in jobs:
        try:
            with store.blobs.file(job.spec.data_digest):
                yield None
        except StoreCorrupt as error:
            yield f"{job.id}, its examples: {error.message}" if store.jobs.job(job.tenant, job.id) else None
    for job in jobs:
        if job.checkpoint is not None:
            yield _checkpoint(store, job)


def _checkpoint(store: Store, job: TrainingJob) -> str | None:
    try:
        store.jobs.checkpoint(job)
    except StoreCorrupt as error:
        now = store.jobs.job(job.tenant, job.id)  # a job that runs replaces it
        same = now is not None and now.checkpoint == job.checkpoint
        return f"{job.id}, its checkpoint: {error.message}" if same else None
    return None


def _names(store: Store) -> list[str]:
    """Names whose current version or aliases lead nowhere."""
    wrong = []
    for key, _ in walk(store.backend, "name/"):
        wrong += _settled(store, _dangling, key)
    return wrong


def _dangling(view: View, path: str) -> list[str]:
    tenant, _, name = path.partition("/")
    data = view.get(layout.name(tenant, name))
    if data is None:
        return []
    record = NameRecord(**data)
    meant = {"the current version": record.current, **record.aliases}
    found = view.get_many([layout.version(tenant, name, number) for number in meant.values()])
    pairs = zip(meant.items(), found, strict=True)
    return [f"{tenant}/{name}: {what} is {number}, which is not there" for (what, number), one in pairs if one is None]


def _counts(store: Store) -> list[str]:
    """Tenants of whom more or less is counted than there is."""
    folders = ("name/", "file/", "jobs/", "usage/")
    tenants = {key.partition("/")[0] for folder in folders for key, _ in walk(store.backend, folder)}
    wrong = []
    for tenant in sorted(tenants):
        wrong += _settled(store, _miscounted, tenant)
    return wrong


def _miscounted(view: View, tenant: str) -> list[str]:
    counted, there = usage.read(view, tenant), recount(view, tenant)
    jobs = {status: count for status, count in counted.jobs.items() if count}
    pairs = {
        "prefixes": (counted.prefixes, there.prefixes),
        "versions": (counted.versions, there.versions),
        "bytes": (counted.bytes, there.bytes),
        "jobs": (jobs, there.jobs),
        "last job": (counted.last_job, there.last_job),
    }
    return [f"{tenant}: {what}: counted {a}, found {b}" for what, (a, b) in pairs.items() if a != b]


def recount(view: View, tenant: str) -> Usage:
    """What a tenant has, counted again from the records themselves."""
    versions = [data for _, data in view.scan(f"version/{tenant}/")]
    files = [data for _, data in view.scan(layout.file(tenant))]
    numbers = view.scan(layout.jobs("jobs", tenant))
    jobs = view.get_many([layout.job(job_id) for _, job_id in numbers])
    return Usage(
        prefixes=len(view.scan(layout.name(tenant))),
        versions=len(versions),
        bytes=sum(data["size_bytes"] for data in versions + files),
        last_job=layout.number_of(numbers[-1][0]) if numbers else 0,
        jobs=dict(Counter(data["status"] for data in jobs if data is not None)),
    )


def _settled(store: Store, look: Callable[[View, str], list[str]], at: str) -> list[str]:
    """What is still wrong at the last look."""
    found: list[str] = []
    for number in range(LOOKS):
        with store.backend.view() as view:
            found = look(view, at)
        if not found:
            break
        time.sleep(PAUSE_SECONDS if number + 1 < LOOKS else 0)
    return found
