import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefix_store.prefix import PrefixRef
from prefix_store.store import Store
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
