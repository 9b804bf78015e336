from pathlib import Path

import pytest

from prefix_store import codec
from tests.prefix_store.cli.conftest import Antefix, Running
from tests.server import artefacts


@pytest.fixture
def three(antefix: Antefix, running: Running, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A name with three versions."""
    name = request.node.name.removeprefix("test_").replace("_", "-")[:40]
    for seed in range(3):
        (tmp_path / "file").write_bytes(artefacts.native(running.frozen, seed=seed))
        antefix("prefix", "push", name, tmp_path / "file")
    return name


def test_versions_aliases_and_back(antefix: Antefix, three: str) -> None:
    assert antefix("prefix", "alias", f"{three}@1", "stable").stdout.startswith(f"{three}@1\tprefix\t4 tokens\t")
    lines = antefix("prefix", "versions", three).stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"{three}@{number}" for number in (1, 2, 3)]
    assert [line.split("\t")[4:] for line in lines] == [["stable"], [], ["current"]]
    assert antefix("prefix", "rollback", three).stdout.startswith(f"{three}@2\t")
    assert "current, stable" in antefix("prefix", "rollback", f"{three}@1").stdout
    assert "is the lowest version" in antefix("prefix", "rollback", three).stderr
    assert "has the alias stable" in antefix("prefix", "rm", f"{three}@1").stderr
    assert antefix("prefix", "unalias", f"{three}@stable").exit_code == 0
    assert f"there is no prefix '{three}@stable'" in antefix("prefix", "unalias", f"{three}@stable").stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["alias", "name", "stable"], "expected name@version"),
        (["alias", "name@x", "stable"], "expected name@version"),
        (["alias", "name@1", "../x"], "must be 1 to 64"),
        (["unalias", "name"], "expected name@alias"),
        (["unalias", "../x@a"], "prefix reference must be"),
        (["rollback", "name@x"], "expected name@version"),
        (["versions", "name@1"], "versions are a name's"),
        (["share", "name", "a", "--all"], "name tenants, or --all, or --none"),
        (["push", "name", "FILE", "--if-match", "abc"], "--if-match takes a digest"),
        (["edit", "name"], "there is nothing to change"),
        (["edit", "name", "--ttl", "1d", "--keep"], "cannot both be"),
    ],
)
def test_what_cannot_be_meant_is_said(antefix: Antefix, tmp_path: Path, command: list[str], said: str) -> None:
    (tmp_path / "f").touch()
    result = antefix("prefix", *(str(tmp_path / "f") if word == "FILE" else word for word in command))
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in result.stderr


def test_sharing(antefix: Antefix, three: str) -> None:
    assert antefix("prefix", "share", three).stdout == f"{three} is shared with nobody\n"
    assert antefix("prefix", "share", three, "b", "a").stdout == f"{three} is shared with a, b\n"
    assert antefix("prefix", "share", three, "--all").stdout == f"{three} is shared with every tenant\n"
    assert antefix("prefix", "share", three).stdout == f"{three} is shared with every tenant\n"
    assert antefix("prefix", "share", three, "--none").stdout == f"{three} is shared with nobody\n"


def test_what_others_share_is_listed_by_its_full_name(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(artefacts.native(running.frozen))
    prefixes = running.store.prefixes
    for name in ("theirs", "yours"):
        prefixes.save("friend", name, *codec.decode(tmp_path / "file"))
        prefixes.share("friend", name, ["default"])
    lines = antefix("prefix", "ls", "--shared").stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["friend/theirs@1", "friend/yours@1"]
    assert '"tenant": "friend"' in antefix("prefix", "show", "friend/theirs").stdout
    assert "friend" not in antefix("prefix", "ls").stdout


def test_push_with_notes_a_lifetime_and_a_condition(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(artefacts.native(running.frozen))

    def push(*options: str) -> str:
        result = antefix("prefix", "push", "noted", tmp_path / "file", *options)
        return result.stdout or result.stderr

    assert push("--if-match", "*").startswith("antefix: If-Match")
    assert push("--new", "--metadata", "team=sales", "--metadata", "empty=", "--ttl", "7d").startswith("noted@1 ")
    assert push("--new").startswith("antefix: If-None-Match")
    stored = running.store.prefixes.page("default", wanted=lambda version: version.name == "noted")[0]
    assert stored.metadata == {"team": "sales", "empty": ""}
    assert stored.expires_at == pytest.approx(stored.created_at + 7 * 86400)
    assert "noted" in antefix("prefix", "ls", "--metadata", "team=sales", "--method", "prefix").stdout
    assert antefix("prefix", "ls", "--metadata", "team=x").stdout == ""
    assert push("--if-match", stored.digest).startswith("noted@2 ")
    assert push("--metadata", "team").count("expected KEY=VALUE") == 1
    assert antefix("prefix", "rm", "noted", "--if-match", "0" * 64).exit_code == 1
    assert antefix("prefix", "rm", "noted", "--if-match", stored.digest).exit_code == 0


def test_edit_changes_what_it_is_told_to(antefix: Antefix, running: Running, three: str) -> None:
    antefix("prefix", "edit", three, "--metadata", "a=1", "--metadata", "b=2", "--pin", "--ttl", "1h")
    shown = antefix("prefix", "edit", three, "--metadata", "a=", "--keep").stdout
    for field in ('"b": "2"', '"pinned": true', '"expires_at": null'):
        assert field in shown
    assert '"a"' not in shown
    assert "is pinned" in antefix("prefix", "rm", three).stderr
    assert '"pinned": false' in antefix("prefix", "edit", three, "--unpin").stdout
