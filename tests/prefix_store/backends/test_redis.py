"""What is Redis's and Valkey's own; the verbs are tested in test_base.py."""

import re
import threading

import pytest
import redis

from prefix_store.backends import redis as redis_backend
from prefix_store.backends.redis import RedisBackend
from prefix_store.backends.redis_client import INDEX, RECORDS, SCHEMA
from prefix_store.errors import StoreUnavailable
from tests.prefix_store.conftest import SERVERS


@pytest.fixture(params=SERVERS)
def kind(request):
    return request.param


@pytest.fixture
def server(kind, servers):
    return servers(kind)


@pytest.fixture
def backend(server):
    opened = RedisBackend(server.url)
    yield opened
    opened.close()


def put(backend, key, value):
    backend.write(lambda transaction: transaction.put(key, value))


def get(backend, key):
    with backend.view() as view:
        return view.get(key)


def test_a_newer_schema_is_refused(server):
    with redis.Redis.from_url(server.url) as client:
        client.set(SCHEMA, 99)
    with pytest.raises(StoreUnavailable, match="newer antefix: its schema is 99, this one knows 2"):
        RedisBackend(server.url)


def test_three_keys_hold_all_records(backend):
    for number in range(3):
        put(backend, f"a/{number}", number)
    backend.write(lambda transaction: transaction.delete("a/1"))
    client = backend._client
    assert set(client.keys()) == {INDEX.encode(), RECORDS.encode(), SCHEMA.encode()}
    assert client.zrange(INDEX, 0, -1) == [b"a/0", b"a/2"]
    assert client.hlen(RECORDS) == 2


def test_a_server_that_is_not_there_is_told_without_its_password(tmp_path):
    for url in ("redis://user:s3cret@127.0.0.1:1/0", f"unix://user:s3cret@{tmp_path}/no.sock"):
        with pytest.raises(StoreUnavailable, match="cannot be used") as caught:
            RedisBackend(url)
        assert "s3cret" not in caught.value.message


@pytest.mark.parametrize("url", ["redis://user:s3/cret@host/0", "redis://user:s3cret@host:port/0", "redis://h/0?x=1%"])
def test_an_address_of_no_use_is_told_without_its_password(url):
    with pytest.raises(StoreUnavailable) as caught:
        RedisBackend(url)
    assert not re.search("s3|cret", caught.value.message)


def test_a_commit_whose_connection_breaks_is_not_repeated(backend, monkeypatch):
    """The server may have carried it out; whoever asked for it must look."""
    commits = []
    commit = backend._commit

    def break_off(*args, **options):
        commits.append(commit(*args, **options))
        raise redis.ConnectionError("Connection closed by server.")

    monkeypatch.setattr(backend, "_commit", break_off)
    runs = []

    def work(transaction):
        runs.append(1)
        transaction.put("count", (transaction.get("count") or 0) + 1)

    with pytest.raises(StoreUnavailable, match="cannot be used"):
        backend.write(work)
    assert (len(runs), commits) == (1, [1])
    assert get(backend, "count") == 1


def test_others_who_are_always_quicker_are_an_error_in_the_end(backend, server, monkeypatch):
    monkeypatch.setattr(redis_backend, "PATIENCE_SECONDS", 0.2)
    other = RedisBackend(server.url)
    put(backend, "count", 0)

    def work(transaction):
        count = transaction.get("count")
        put(other, "count", count + 1)
        transaction.put("count", count + 100)

    with pytest.raises(StoreUnavailable, match="too busy"):
        backend.write(work)
    assert 1 <= get(backend, "count") < 100
    other.close()


def test_a_stopped_server_is_an_error_and_a_started_one_none(kind, fresh_server):
    server = fresh_server(kind)
    backend = RedisBackend(server.url)
    threads = [threading.Thread(target=put, args=(backend, f"a/{number}", 1)) for number in range(8)]
    for thread in threads:  # several connections, all of which break
        thread.start()
    for thread in threads:
        thread.join()
    server.stop()
    for act in (backend.ping, lambda: put(backend, "a/9", 1), lambda: get(backend, "a/1")):
        with pytest.raises(StoreUnavailable, match="cannot be used"):
            act()
    server.start()
    for number in range(8):
        assert get(backend, f"a/{number}") == 1
    put(backend, "a/9", 1)
    assert get(backend, "a/9") == 1
    backend.close()


@pytest.mark.parametrize("dumps", ["", "3600 1"])
def test_what_was_removed_leaves_no_byte_once_it_is_scrubbed(kind, fresh_server, tmp_path, dumps):
    marker = b"m4rk3r-m4rk3r"
    server = fresh_server(kind)
    backend = RedisBackend(server.url)
    put(backend, "a/1", marker.decode())
    backend._client.config_set("save", dumps)
    backend._client.save()
    backend.write(lambda transaction: transaction.delete("a/1"))

    def where():
        files = {path for path in tmp_path.rglob("*") if path.is_file() and marker in path.read_bytes()}
        return files if dumps else {path for path in files if path.suffix != ".rdb" or "appendonly" in path.name}

    assert where()
    backend.scrub()
    assert not where()
    backend.close()
