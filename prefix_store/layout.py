"""How records are named: the one place. A key is a path of parts without `/`, so that a scan stays inside a folder.

name/TENANT/NAME                  last and current version, aliases, whom it is shared with
retired/TENANT/NAME               the last version of a name that has none left
version/TENANT/NAME/NUMBER        a version
expiry/MILLISECONDS/TENANT/…      when a version ends
shared/READER/TENANT/NAME         a name shared with a tenant, or with `*`
tombstone/TENANT/NAME/NUMBER      a version that was deleted and whose blob is still kept
blob/DIGEST/version/TENANT/…      why a blob is kept: a version or tombstone,
blob/DIGEST/job/JOB                 a job's examples,
blob/DIGEST/checkpoint/JOB          where a job goes on from,
blob/DIGEST/file/FILE               an uploaded file,
blob/DIGEST/hold/ID                 or a record that is about to be written
file/TENANT/FILE                  an uploaded file
job/JOB                           a job
jobs/TENANT/NUMBER                a tenant's jobs in the order they came
queued/TENANT/NUMBER              those that wait
running/TENANT/NUMBER             those that a worker holds, and until when
turn/TENANT                       when a job of the tenant last stopped running, to which others then come first
event/JOB/NUMBER                  a job's history
tenant/TENANT                     a tenant and its quotas
usage/TENANT                      what it has, counted
key/ID                            an API key
once/TENANT/HASH                  the answer to a request that may be repeated
audit/MILLISECONDS-ID             who did what
store/id, store/unfinished        which store this is, and that a copy into it has not ended; no copy takes them along
"""

from __future__ import annotations

EVERYONE = "*"
STORE_ID = "store/id"
UNFINISHED = "store/unfinished"


def name(tenant: str, name: str = "") -> str:
    """A name's record; without a name, the folder of the tenant's."""
    return f"name/{tenant}/{name}"


def retired(tenant: str, name: str) -> str:
    """What is remembered of a name without versions."""
    return f"retired/{tenant}/{name}"


def version(tenant: str, name: str, number: int) -> str:
    """A version's record."""
    return f"version/{_version_path(tenant, name, number)}"


def versions(tenant: str, name: str) -> str:
    """The folder of a name's versions."""
    return f"version/{tenant}/{name}/"


def tombstone(tenant: str, name: str, number: int) -> str:
    """What a deleted version leaves until its blob may go."""
    return f"tombstone/{_version_path(tenant, name, number)}"


def expiry(at: float, tenant: str, name: str, number: int) -> str:
    """When a version ends, in order of time."""
    return f"expiry/{milliseconds(at)}/{_version_path(tenant, name, number)}"


def shared(reader: str, tenant: str = "", name: str = "") -> str:
    """A name that a reader may use; without one, the folder of all that the reader may use."""
    return f"shared/{reader}/{tenant}/{name}" if tenant else f"shared/{reader}/"


def blob(digest: str) -> str:
    """The folder of reasons to keep a blob."""
    return f"blob/{digest}/"


def blob_of_version(digest: str, tenant: str, name: str, number: int) -> str:
    """The blob is a version's."""
    return f"{blob(digest)}version/{_version_path(tenant, name, number)}"


def blob_of_job(digest: str, job_id: str) -> str:
    """The blob is a job's examples."""
    return f"{blob(digest)}job/{job_id}"


def blob_of_checkpoint(digest: str, job_id: str) -> str:
    """The blob is what a job goes on from."""
    return f"{blob(digest)}checkpoint/{job_id}"


def blob_of_file(digest: str, file_id: str) -> str:
    """The blob is an uploaded file."""
    return f"{blob(digest)}file/{file_id}"


def hold(digest: str, hold_id: str) -> str:
    """The blob is about to be named."""
    return f"{blob(digest)}hold/{hold_id}"


def file(tenant: str, file_id: str = "") -> str:
    """An uploaded file's record; without an id, the folder of the tenant's."""
    return f"file/{tenant}/{file_id}"


def job(job_id: str) -> str:
    """A job's record."""
    return f"job/{job_id}"


def jobs(folder: str, tenant: str, number: int | None = None) -> str:
    """A job's entry in `jobs`, `queued` or `running`; without a number, the folder of the tenant's."""
    return f"{folder}/{tenant}/" + (f"{number:012d}" if number is not None else "")


def turn(tenant: str) -> str:
    """When the tenant last had its turn."""
    return f"turn/{tenant}"


def event(job_id: str, number: int | None = None) -> str:
    """A line of a job's history; without a number, the folder of it."""
    return f"event/{job_id}/" + (f"{number:09d}" if number is not None else "")


def tenant(tenant: str) -> str:
    """A tenant's record."""
    return f"tenant/{tenant}"


def usage(tenant: str) -> str:
    """What a tenant has."""
    return f"usage/{tenant}"


def key(key_id: str) -> str:
    """An API key's record."""
    return f"key/{key_id}"


def once(tenant: str, request: str) -> str:
    """The answer to a request that may be repeated."""
    return f"once/{tenant}/{request}"


def audit(at: float, entry_id: str) -> str:
    """A line of the audit log, in order of time: two changes are often made within one millisecond."""
    return f"audit/{milliseconds(at)}-{_microseconds(at) % 1000:03d}{entry_id}"


def milliseconds(at: float) -> str:
    """A time as a part of a key, ordered as times are."""
    return f"{_microseconds(at) // 1000:015d}"


def _microseconds(at: float) -> int:
    return int(at * 1_000_000)


def number_of(part: str) -> int:
    """The number at the end of a key."""
    return int(part.rpartition("/")[2])


def _version_path(tenant: str, name: str, number: int) -> str:
    return f"{tenant}/{name}/{number:09d}"
