import json
from pathlib import Path

import pytest

from prefix_store.store import Store
from tests.prefix_store.cli.conftest import Antefix
from tests.prefix_store.samples import manifest, tensors


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ANTEFIX_STORE", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.delenv("ANTEFIX_BLOBS", raising=False)
    return f"sqlite:///{tmp_path}/store.db"


def test_a_tenant_is_made_and_listed(antefix: Antefix, url: str) -> None:
    assert antefix("tenant", "new", "acme").exit_code == 0
    assert "there is a tenant 'acme' already" in antefix("tenant", "new", "acme").stderr
    assert "tenant must be 1 to 64" in antefix("tenant", "new", "No Name").stderr
    assert antefix("tenant", "ls").stdout == "acme\t0 prefixes (0 versions)\t0 B\t0 unfinished jobs\n"


def test_quotas_are_set_and_taken_away(antefix: Antefix, url: str) -> None:
    antefix("tenant", "new", "acme")
    shown = antefix("tenant", "quota", "acme", "--prefixes", "20", "--bytes", "2G", "--tokens-per-minute", "0").stdout
    assert shown.splitlines() == [
        "prefixes\t20", f"bytes\t{2 << 30}", "jobs\tnone", "requests_per_minute\tnone", "tokens_per_minute\t0",
        "concurrent_sequences\tnone",
    ]  # fmt: skip
    assert "bytes\tnone" in antefix("tenant", "quota", "acme", "--bytes", "none").stdout
    assert "prefixes\t20" in antefix("tenant", "quota", "acme").stdout
    for wrong in ("-1", "many", "1.5", ""):
        result = antefix("tenant", "quota", "acme", "--jobs", wrong)
        assert result.exit_code == 2
        assert "expected a number" in result.stderr
    assert "antefix tenant new" in antefix("tenant", "quota", "nobody", "--jobs", "1").stderr


def test_the_tenant_of_open_mode_is_one_though_nobody_made_it(antefix: Antefix, url: str) -> None:
    store = Store.open(url)
    store.prefixes.save("default", "support", manifest(), tensors(manifest()))
    store.close()
    assert antefix("tenant", "ls").stdout.startswith("default\t1 prefix (1 version)")
    assert "prefixes\t5" in antefix("tenant", "quota", "default", "--prefixes", "5").stdout


def test_show_is_json(antefix: Antefix, url: str) -> None:
    antefix("key", "new", "--tenant", "acme")
    key_id = antefix("key", "ls").stdout.split("\t")[0]
    shown = json.loads(antefix("tenant", "show", "acme").stdout)
    assert (shown["tenant"], shown["keys"], shown["usage"]["prefixes"]) == ("acme", [key_id], 0)
    assert shown["quotas"]["bytes"] is None
    assert "there is no tenant 'nobody'" in antefix("tenant", "show", "nobody").stderr


def test_erasing_asks_and_then_says_what_is_gone(antefix: Antefix, url: str, tmp_path: Path) -> None:
    store = Store.open(url)
    for tenant in ("acme", "other"):
        version = store.prefixes.save(tenant, "secret-name", manifest(), tensors(manifest(), seed=len(tenant)))
        store.keys.create(tenant, ["generate"])
    store.close()
    asked = antefix("tenant", "rm", "acme")
    assert asked.exit_code == 1
    assert "Erase tenant acme with 1 prefix (1 version), 0 jobs, 1 key? This cannot be undone" in asked.stderr
    assert "acme" in antefix("tenant", "ls").stdout
    result = antefix("tenant", "rm", "acme", "--yes")
    assert result.stdout.startswith("erased acme: 1 prefix (1 version), 0 jobs, 1 key; ")
    assert "acme" not in antefix("tenant", "ls").stdout
    again = antefix("tenant", "rm", "acme", "--yes")  # as after one that was interrupted
    assert (again.exit_code, again.stdout) == (0, "nothing was left of a tenant acme\n")
    store = Store.open(url)
    assert store.prefixes.resolve(version.ref) == version
    assert len(list((tmp_path / "blobs").glob("sha256/*/*"))) == 1
    store.close()
    assert not any(b"acme" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("command", [["tenant", "ls"], ["key", "ls"], ["audit"], ["store", "collect"]])
def test_where_there_is_no_store_none_is_made(antefix: Antefix, url: str, tmp_path: Path, command: list[str]) -> None:
    result = antefix(*command)
    assert (result.exit_code, result.stdout, list(tmp_path.iterdir())) == (1, "", [])
    assert result.stderr == f"antefix: there is no store at {tmp_path}/store.db; ANTEFIX_STORE says where it is\n"
