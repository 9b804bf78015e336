from pathlib import Path

from tests.prefix_store.cli.conftest import Antefix, Running
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


def test_a_refused_file_shows_the_reason(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(artefacts.damaged(running.frozen)["pickle"])
    result = antefix("prefix", "push", "x", tmp_path / "bad")
    assert result.exit_code == 1
    assert "pickle" in result.stderr
