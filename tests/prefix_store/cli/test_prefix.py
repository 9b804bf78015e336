from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.prefix_store.cli.conftest import HOSTILE, SPELT, Antefix, Instead, Running
from tests.server import artefacts


def test_a_native_file_goes_up_and_comes_back_the_same(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(artefacts.native(running.frozen))
    assert antefix("prefix", "push", "native", tmp_path / "in").stdout.startswith("native@1 ")
    assert antefix("prefix", "pull", "native", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in").read_bytes()


def test_a_peft_folder_goes_up_and_comes_back_the_same(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    files = artefacts.adapter(running.frozen)
    result = antefix("prefix", "push", "adapter", artefacts.write(files, tmp_path / "in"))
    assert "does not say which base model" in result.stdout
    assert antefix("prefix", "pull", "adapter", tmp_path / "out", "--format", "peft").exit_code == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


def test_list_show_and_remove(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(artefacts.native(running.frozen))
    for _ in range(2):
        antefix("prefix", "push", "listed", tmp_path / "in")
    assert "listed@2\tprefix\t4 tokens" in antefix("prefix", "ls").stdout
    assert '"version": 1' in antefix("prefix", "show", "listed@1").stdout
    assert antefix("prefix", "rm", "listed").stdout == "removed listed, versions 1, 2\n"
    assert "listed" not in antefix("prefix", "ls").stdout


def test_a_folder_without_the_adapter_s_files_is_named(antefix: Antefix, tmp_path: Path) -> None:
    result = antefix("prefix", "push", "x", tmp_path)
    assert result.exit_code == 1
    assert "no adapter_config.json and no adapter_model.safetensors" in result.stderr


@pytest.mark.parametrize("name", ["No Name", "", "..", "a/b"])
def test_a_name_against_the_rules_is_refused_before_anything_is_sent(
    antefix: Antefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("ANTEFIX_URL", "http://127.0.0.1:9")
    (tmp_path / "f").touch()
    result = antefix("prefix", "push", name, tmp_path / "f")
    rule = "prefix id must be 1 to 64 of a-z 0-9 . _ -, beginning with a letter or digit"
    assert (result.exit_code, result.stderr) == (1, f"antefix: {rule}; got {name!r}\n")


@pytest.mark.parametrize("command", [["show"], ["rm"], ["pull"]])
def test_a_reference_does_not_lead_elsewhere(antefix: Antefix, tmp_path: Path, command: list[str]) -> None:
    result = antefix("prefix", *command, "../jobs", *([tmp_path / "x"] if command == ["pull"] else []))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "prefix reference must be name" in result.stderr


def test_what_is_neither_file_nor_folder_is_refused(antefix: Antefix) -> None:
    assert antefix("prefix", "push", "x", "/dev/null").stderr == "antefix: /dev/null is neither a file nor a folder\n"


def test_a_refused_file_shows_the_reason(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(artefacts.damaged(running.frozen)["pickle"])
    result = antefix("prefix", "push", "x", tmp_path / "bad")
    assert result.exit_code == 1
    assert "pickle" in result.stderr


@pytest.mark.parametrize("change", [{"id": HOSTILE}, {"method": HOSTILE}, {"digest": HOSTILE}])
def test_no_field_of_a_prefix_moves_the_cursor(
    antefix: Antefix, instead: Instead, tmp_path: Path, change: dict[str, Any]
) -> None:
    item = {"id": "a", "version": 1, "method": "prefix", "virtual_tokens": 4, "digest": "d", "base_checked": True}
    item |= change
    page = {"data": [item], "has_more": False, "versions": [HOSTILE]}
    instead(lambda request: httpx.Response(200, json=item | page))
    (tmp_path / "f").write_bytes(b"x")
    shown = [antefix("prefix", *rest).stdout for rest in (["ls"], ["push", "a", tmp_path / "f"], ["rm", "a"])]
    assert SPELT in shown[0]
    assert SPELT in shown[2]
    assert not set("\x1b\u200f") & set("".join(shown))
