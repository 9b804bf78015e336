"""The shared backend: all records in one hash of a Redis or Valkey server, their keys in one sorted set.

A transaction reads freely and remembers what it has read; one script then writes, if all of that still holds.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import redis

from prefix_store.backends.base import BufferedTransaction, T, Transaction, View, bounds, from_json
from prefix_store.backends.redis_client import INDEX, RECORDS, SCHEMA, answering, connect, rewrite
from prefix_store.errors import StoreCorrupt, StoreUnavailable

SCHEMA_VERSION = 2
# How long a transaction is tried again because others were quicker.
PATIENCE_SECONDS = 10.0
# what they should be, and why
SETTINGS = {
    "appendonly": ("yes", "what was written since the last snapshot is lost with the process"),
    "maxmemory-policy": ("noeviction", "records are removed when memory runs short"),
}
Range = tuple[str, str, int, bool]

# KEYS: index, records. ARGV: the range's lower and upper key, how many, 1 for descending. Returns key, value, key, …
_SCAN = """
local members
if ARGV[4] == '1' then
  members = redis.call('ZRANGE', KEYS[1], '(' .. ARGV[2], '(' .. ARGV[1], 'BYLEX', 'REV', 'LIMIT', 0, ARGV[3])
else
  members = redis.call('ZRANGE', KEYS[1], '(' .. ARGV[1], '(' .. ARGV[2], 'BYLEX', 'LIMIT', 0, ARGV[3])
end
local found = {}
for _, key in ipairs(members) do
  found[#found + 1] = key
  found[#found + 1] = redis.call('HGET', KEYS[2], key)
end
return found
"""

# KEYS: index, records. ARGV[1]: JSON of what was read and what is to be written. Returns 1 if it was, else 0.
_COMMIT = """
local plan = cjson.decode(ARGV[1])
for _, range in ipairs(plan.ranges) do
  local low, high, limit, members = '(' .. range[1], '(' .. range[2], range[3]
  if range[4] then
    members = redis.call('ZRANGE', KEYS[1], high, low, 'BYLEX', 'REV', 'LIMIT', 0, limit)
  else
    members = redis.call('ZRANGE', KEYS[1], low, high, 'BYLEX', 'LIMIT', 0, limit)
  end
  if #members ~= #range[5] then return 0 end
  for i, key in ipairs(members) do if key ~= range[5][i] then return 0 end end
end
for _, record in ipairs(plan.reads) do
  local value = redis.call('HGET', KEYS[2], record[1])
  if not value then value = cjson.null end
  if value ~= record[2] then return 0 end
end
for _, record in ipairs(plan.writes) do
  if record[2] == cjson.null then
    redis.call('HDEL', KEYS[2], record[1])
    redis.call('ZREM', KEYS[1], record[1])
  else
    redis.call('HSET', KEYS[2], record[1], record[2])
    redis.call('ZADD', KEYS[1], 0, record[1])
  end
end
return 1
"""


class RedisBackend:
    """Implements `backends.base.Backend`, where the contracts stand, for Redis 6.2 and Valkey, and later ones."""

    def __init__(self, url: str, clock: Callable[[], float] | None = None) -> None:
        """`clock` replaces the server's own, which all who share it go by. Raises StoreUnavailable."""
        self._client = connect(url)
        self._closed = False
        self._clock = clock or self._server_time
        self._scan = self._client.register_script(_SCAN)
        self._commit = self._client.register_script(_COMMIT)
        self._check_schema()

    @contextmanager
    def view(self) -> Iterator[View]:
        """See `Backend`."""
        with self._answering():
            yield self._view()

    def write(self, work: Callable[[Transaction], T]) -> T:
        """See `Backend`. Raises StoreUnavailable too when others are quicker for `PATIENCE_SECONDS`."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        pause = 0.001
        while True:
            with self._answering():
                view = self._view()
                transaction = BufferedTransaction(view)
                try:
                    result = work(transaction)
                except redis.RedisError:
                    raise
                except Exception:
                    if self._keep(view, {}):  # else it may have failed on a mixture of two moments
                        raise
                else:
                    if self._keep(view, transaction.writes):
                        return result
            if time.monotonic() > deadline:
                raise StoreUnavailable("the store is too busy: others kept changing the same records")
            time.sleep(random.uniform(0, pause))
            pause = min(2 * pause, 0.1)

    def ping(self) -> None:
        """See `Backend`."""
        with self._answering():
            self._client.ping()

    def examine(self) -> list[str]:
        """See `Backend`."""
        try:
            with answering():
                return [
                    f"{name} is {found!r} and should be {wanted!r}: {why}"
                    for name, (wanted, why) in SETTINGS.items()
                    if (found := _text(self._client.config_get(name).get(name))) != wanted
                ]
        except StoreUnavailable:
            return ["Redis does not let its settings be read; see to it that " + " and ".join(_wanted())]

    def scrub(self) -> None:
        """Has the server write its files anew without what was removed, and waits for it."""
        with self._answering():
            rewrite(self._client)

    def close(self) -> None:
        """See `Backend`."""
        self._closed = True
        self._client.close()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        if self._closed:
            raise StoreUnavailable("the store is closed")
        with answering():
            yield

    def _view(self) -> _RedisView:
        return _RedisView(self._fields, self._range, self._clock)

    def _fields(self, keys: Sequence[str]) -> list[str | None]:
        found = cast("list[bytes | None]", self._client.hmget(RECORDS, list(keys)))
        return [None if value is None else value.decode() for value in found]

    def _range(self, wanted: Range) -> list[tuple[str, str]]:
        low, high, limit, descending = wanted
        flat = self._scan(keys=[INDEX, RECORDS], args=[low, high, limit, int(descending)])
        if None in flat:
            raise StoreCorrupt(f"the index {INDEX} names a record that {RECORDS} does not have")
        texts = [item.decode() for item in cast("list[bytes]", flat)]
        return list(zip(texts[::2], texts[1::2], strict=True))

    def _keep(self, view: _RedisView, writes: dict[str, str | None]) -> bool:
        plan = {
            "reads": list(view.records.items()),
            "ranges": [[*wanted, members] for wanted, members in view.ranges],
            "writes": list(writes.items()),
        }
        return bool(self._commit(keys=[INDEX, RECORDS], args=[json.dumps(plan)]))

    def _server_time(self) -> float:
        seconds, microseconds = self._client.time()
        return seconds + microseconds / 1e6

    def _check_schema(self) -> None:
        with answering():
            self._client.set(SCHEMA, SCHEMA_VERSION, nx=True)
            version = int(cast("bytes", self._client.get(SCHEMA)))
        if version > SCHEMA_VERSION:
            raise StoreUnavailable(
                f"the store was written by a newer antefix: its schema is {version}, this one knows {SCHEMA_VERSION}"
            )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _wanted() -> list[str]:
    return [f"{name} is {wanted}" for name, (wanted, _) in SETTINGS.items()]


class _RedisView:
    """Reads, and remembers what came: `records` by key, and the keys that each range held."""

    def __init__(
        self,
        fields: Callable[[Sequence[str]], list[str | None]],
        scan: Callable[[Range], list[tuple[str, str]]],
        clock: Callable[[], float],
    ) -> None:
        self._fields = fields
        self._scan = scan
        self._clock = clock
        self._now: float | None = None
        self.records: dict[str, str | None] = {}
        self.ranges: list[tuple[Range, list[str]]] = []

    @property
    def now(self) -> float:
        if self._now is None:
            self._now = self._clock()
        return self._now

    def get(self, key: str) -> Any:
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[str]) -> list[Any]:
        if not keys:
            return []
        found = self._fields(keys)
        self._remember(zip(keys, found, strict=True))
        return [from_json(value) for value in found]

    def scan(
        self, prefix: str, *, after: str = "", limit: int | None = None, descending: bool = False
    ) -> list[tuple[str, Any]]:
        low, high = bounds(prefix, after, descending)
        wanted = (low, high, -1 if limit is None else limit, descending)
        found = self._scan(wanted)
        self._remember(found)
        self.ranges.append((wanted, [key for key, _ in found]))
        return [(key[len(prefix) :], from_json(value)) for key, value in found]

    def _remember(self, found: Iterable[tuple[str, str | None]]) -> None:
        for key, value in found:
            self.records.setdefault(key, value)  # what was read first must still hold in the end
