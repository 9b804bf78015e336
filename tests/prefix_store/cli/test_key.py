from pathlib import Path

import pytest

from prefix_store.store import Store
from tests.prefix_store.cli.conftest import Antefix


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ANTEFIX_STORE", f"sqlite:///{tmp_path}/store.db")
    return f"sqlite:///{tmp_path}/store.db"


def test_a_new_key_opens_the_store_s_server(antefix: Antefix, url: str) -> None:
    result = antefix("key", "new", "--tenant", "acme", "--scope", "generate", "--scope", "prefix:read")
    store = Store.open(url)
    key = store.keys.authenticate(result.stdout.strip())
    store.close()
    assert (key.tenant, key.scopes) == ("acme", {"generate", "prefix:read"})


def test_list_shows_no_secret_and_remove_removes(antefix: Antefix, url: str) -> None:
    presented = antefix("key", "new").stdout.strip()
    (line,) = antefix("key", "ls").stdout.splitlines()
    key_id, tenant, scopes = line.split("\t")
    assert tenant == "default"
    assert "generate" in scopes
    assert not {"metrics", "admin"} & set(scopes.split(",")), "they reach beyond the tenant"
    assert presented.split("_", 2)[2] not in line
    assert antefix("key", "rm", key_id).exit_code == 0
    assert antefix("key", "ls").stdout == ""
    assert "there is no key" in antefix("key", "rm", key_id).stderr


def test_what_the_store_refuses_is_one_line(antefix: Antefix, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "scopes must be some of" in antefix("key", "new", "--scope", "everything").stderr
    assert "tenant" in antefix("key", "new", "--tenant", "No Name").stderr
    monkeypatch.setenv("ANTEFIX_STORE", "postgres://x")
    result = antefix("key", "ls")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


def test_the_stores_address_may_lie_in_a_file(
    antefix: Antefix, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert antefix("key", "new").exit_code == 0
    monkeypatch.setenv("ANTEFIX_STORE", "sqlite:///passed/over.db")
    monkeypatch.setenv("ANTEFIX_STORE_FILE", str(tmp_path / "address"))
    result = antefix("key", "ls")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "address': the file cannot be read: No such file or directory" in result.stderr
    (tmp_path / "address").write_text(f"{url}\n")
    assert len(antefix("key", "ls").stdout.splitlines()) == 1


def test_a_key_may_expire(antefix: Antefix, url: str) -> None:
    made = antefix("key", "new", "--expires", "30d")
    assert ", until 2" in made.stderr
    store = Store.open(url)
    key = store.keys.authenticate(made.stdout.strip())
    store.close()
    assert key.expires_at == pytest.approx(key.created_at + 30 * 86400)
    assert "\tuntil 2" in antefix("key", "ls").stdout
    assert "expected a time" in antefix("key", "new", "--expires", "soon").stderr


def test_rotating_makes_another_like_it_and_ends_the_old_one(antefix: Antefix, url: str) -> None:
    old = antefix("key", "new", "--tenant", "acme", "--scope", "train").stdout.strip()
    key_id = old.split("_")[1]
    new = antefix("key", "rotate", key_id, "--overlap", "1h")
    assert "ends within 1 h" in new.stderr
    store = Store.open(url)
    first, second = (store.keys.authenticate(presented) for presented in (old, new.stdout.strip()))
    store.close()
    assert (second.tenant, second.scopes, second.expires_at) == ("acme", {"train"}, None)
    assert first.expires_at == pytest.approx(second.created_at + 3600)
    assert "there is no key 'nothing1'" in antefix("key", "rotate", "nothing1").stderr
