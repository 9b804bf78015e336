import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefix_store import layout
from prefix_store.prefix import PrefixRef
from prefix_store.store import Store
from tests import redis_server
from tests.prefix_store.cli.conftest import HOSTILE, SPELT, Antefix
from tests.prefix_store.samples import Clock, manifest, tensors

MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("ANTEFIX_STORE", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.delenv("ANTEFIX_BLOBS", raising=False)
    opened = Store.open(f"sqlite:///{tmp_path}/store.db")
    yield opened  # stays open: a server may run meanwhile
    opened.close()


def save(store: Store, name: str = "support", seed: int = 0, **options: object) -> str:
    return store.prefixes.save("acme", name, manifest(), tensors(manifest(), seed), **options).digest


# audit


def test_every_change_is_a_line(antefix: Antefix, store: Store) -> None:
    digest = save(store, by="key abcdefgh")
    store.keys.create("other", ["generate"])
    first, second = antefix("audit").stdout.splitlines()
    at, *rest = first.split("\t")
    assert MOMENT.fullmatch(at)
    assert rest == ["key abcdefgh", "acme", "prefix.publish", "support@1", digest[:12]]
    assert second.split("\t")[1:4] == ["local", "other", "key.create"]
    assert antefix("audit", "--tenant", "acme").stdout.splitlines() == [first]
    entry = json.loads(antefix("audit", "--tenant", "acme", "--json").stdout)
    assert (entry["by"], entry["digest"]) == ("key abcdefgh", digest)


def test_only_what_is_recent_if_asked(antefix: Antefix, tmp_path: Path, store: Store) -> None:
    old = Store.open(f"sqlite:///{tmp_path}/store.db", clock=Clock())
    save(old, "old")
    old.close()
    save(store, "new")
    lines = antefix("audit", "--since", "1h").stdout.splitlines()
    assert ["new@1" in line for line in lines] == [True]
    assert len(antefix("audit").stdout.splitlines()) == 2
    assert "expected a time such as" in antefix("audit", "--since", "yesterday").stderr


def test_no_line_moves_the_cursor(antefix: Antefix, store: Store) -> None:
    save(store, by=HOSTILE)
    assert SPELT in antefix("audit").stdout


# the whole store


def test_collect_says_how_much(antefix: Antefix, tmp_path: Path, store: Store) -> None:
    old = Store.open(f"sqlite:///{tmp_path}/store.db", clock=Clock())
    save(old)
    old.prefixes.delete(PrefixRef("acme", "support"))
    old.close()
    assert antefix("store", "collect").stdout == "removed 1 file\n"
    assert antefix("store", "collect").stdout == "removed 0 files\n"


def test_a_store_moves_and_is_the_same(antefix: Antefix, tmp_path: Path, store: Store) -> None:
    digest = save(store)
    source, target = f"sqlite:///{tmp_path}/store.db", f"sqlite:///{tmp_path}/there/store.db"
    result = antefix("store", "migrate", source, target, "--target-blobs", f"file://{tmp_path}/files")
    assert result.stdout.endswith("; both are the same\n")
    assert (tmp_path / "files" / "sha256" / digest[:2] / digest).is_file()
    other = Store.open(f"sqlite:///{tmp_path}/other/store.db")
    save(other, "foreign")
    other.close()
    assert "is not empty" in antefix("store", "migrate", source, f"sqlite:///{tmp_path}/other/store.db").stderr
    missing = antefix("store", "migrate", f"sqlite:///{tmp_path}/typo.db", target)
    assert "there is no store at" in missing.stderr
    assert not (tmp_path / "typo.db").exists()


def test_doctor_is_content_with_what_is_whole(antefix: Antefix, store: Store) -> None:
    save(store)
    store.jobs.submit("acme", "support", [{"prompt": "a", "completion": "b"}], {})
    result = antefix("doctor")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "OK\n", "files: 2 of 2\n")


def test_doctor_names_what_is_damaged_lost_or_miscounted(antefix: Antefix, tmp_path: Path, store: Store) -> None:
    damaged, lost = save(store), save(store, "lost", seed=1)
    save(store, "whole", seed=2)
    files = {digest: tmp_path / "blobs" / "sha256" / digest[:2] / digest for digest in (damaged, lost)}
    files[damaged].write_bytes(b"something else")
    files[lost].unlink()
    usage = {"prefixes": 3, "versions": 3, "bytes": 1, "last_job": 0, "jobs": {}}
    store.backend.write(lambda transaction: transaction.put(layout.usage("acme"), usage))
    store.backend.write(lambda transaction: transaction.put(layout.name("acme", "odd"), {"last": 9, "current": 9}))
    result = antefix("doctor")
    faults = result.stdout.splitlines()
    assert result.exit_code == 1
    assert [line.split(":")[0] for line in faults] == ["fault"] * 5
    expected = ["lost@1: blob", "support@1: blob", "acme/odd: the current", "prefixes: counted 3, found 4"]
    for fault, said in zip(faults, [*expected, "bytes: counted 1"], strict=True):
        assert said in fault


def test_doctor_warns_of_a_redis_that_may_forget(
    antefix: Antefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if redis_server.program("redis") is None:
        pytest.skip("no redis-server for this machine")
    with redis_server.running("redis", tmp_path) as server:
        monkeypatch.setenv("ANTEFIX_STORE", server.url)
        opened = Store.open(server.url)
        save(opened)
        assert antefix("doctor").stdout == "OK\n"
        opened.backend._client.config_set("appendonly", "no")
        opened.backend._client.config_set("maxmemory-policy", "allkeys-lru")
        opened.close()
        result = antefix("doctor")
    warnings = result.stdout.splitlines()
    assert (result.exit_code, warnings.pop()) == (0, "OK")
    assert "warning: appendonly is 'no' and should be 'yes'" in warnings[0]
    assert "warning: maxmemory-policy is 'allkeys-lru' and should be 'noeviction'" in warnings[1]
