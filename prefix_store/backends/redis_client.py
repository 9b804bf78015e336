"""The connection to Redis or Valkey, every key that is used there, and how its failures are told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from prefix_store.errors import StoreUnavailable

# every key of ours
RECORDS = "antefix:records"  # hash: a record's key -> its JSON
INDEX = "antefix:index"  # sorted set, all scores 0: the records' keys in order
SCHEMA = "antefix:schema"  # the layout's version
BLOBS = "antefix:blobs"  # set: digests of blobs, whole or still being written
BLOB = "antefix:blob:{digest}"  # the blob's size; written last
CHUNK = "antefix:blob:{digest}:{number}"  # CHUNK_BYTES of it
TIMEOUT_SECONDS = 10.0
REWRITE_SECONDS = 600.0
# what the server says of itself while it writes its files
WRITING = ("aof_rewrite_in_progress", "aof_rewrite_scheduled", "rdb_bgsave_in_progress")


def connect(url: str) -> redis.Redis:
    """A client whose replies are bytes. Nothing is sent yet. Raises StoreUnavailable for an address of no use."""
    try:
        _check_database(url)
        client = redis.Redis.from_url(
            url,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            # a command that may have been carried out is never sent again: it could publish twice
            retry=Retry(NoBackoff(), 0),
        )
        client.connection_pool.make_connection()  # which reads the rest of the address, and opens nothing
    except (ValueError, TypeError):
        # what is wrong with it may stand in the middle of a password
        raise StoreUnavailable("store address: expected redis://[user:password@]host:port/0") from None
    return client


def _check_database(url: str) -> None:
    """Raises ValueError for a path that is no number, which the client would take for database 0."""
    parts = urlsplit(url)
    if parts.scheme != "unix" and parts.path not in ("", "/"):
        int(parts.path.removeprefix("/"))


@contextmanager
def answering() -> Iterator[None]:
    """Turns what Redis or the network fails with into StoreUnavailable."""
    try:
        yield
    except redis.RedisError as error:
        unavailable = StoreUnavailable(f"the store cannot be used: {str(error)[:200]}")
        is_silent = isinstance(error, redis.ConnectionError | redis.TimeoutError)
        unavailable.may_pass = is_silent and not isinstance(error, redis.AuthenticationError)
        raise unavailable from error


def rewrite(client: redis.Redis) -> None:
    """Has the server write its own files anew, which hold what was removed until then. Raises StoreUnavailable."""
    if _when_idle(client)["aof_enabled"]:
        client.bgrewriteaof()
        _check_written(_when_idle(client)["aof_last_bgrewrite_status"])
    if _makes_dumps(client):
        client.bgsave()
        _check_written(_when_idle(client)["rdb_last_bgsave_status"])


def _when_idle(client: redis.Redis) -> dict[str, Any]:
    """What the server says of its files once it writes none of them."""
    deadline = time.monotonic() + REWRITE_SECONDS
    while True:
        found = client.info("persistence")
        if not any(found[flag] for flag in WRITING):
            return found
        if time.monotonic() > deadline:
            raise StoreUnavailable("the store's server takes too long to rewrite its files; they keep what was removed")
        time.sleep(0.05)


def _makes_dumps(client: redis.Redis) -> bool:
    try:
        settings = cast("dict[str, str]", client.config_get("save"))
    except redis.ResponseError:
        return True  # it does not say
    return bool(settings.get("save"))


def _check_written(status: str) -> None:
    if status != "ok":
        raise StoreUnavailable("the store's server could not rewrite its files; they keep what was removed")
