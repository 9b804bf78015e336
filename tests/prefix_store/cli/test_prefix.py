from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from prefix_store import codec
from prefix_store.cli.foreign import Foreign
from prefix_store.formats import peft, pickled
from prefix_store.prefix import PrefixRef
from prefix_store.tenants import DEFAULT_TENANT
from tests.models import tiny_frozen
from tests.prefix_store import foreign
from tests.prefix_store.cli.conftest import HOSTILE, SPELT, Antefix, Instead, Running
from tests.server import artefacts


def ref(name: str) -> PrefixRef:
    return PrefixRef.parse(name, DEFAULT_TENANT)


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


def test_a_soft_prompt_goes_up_and_comes_back_as_an_adapter(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(artefacts.prompt(running.frozen))
    antefix("prefix", "push", "soft", tmp_path / "in")
    assert antefix("prefix", "pull", "soft", tmp_path / "out", "--format", "peft").exit_code == 0
    _, pulled = peft.read(
        (tmp_path / "out" / peft.CONFIG_FILE).read_bytes(),
        tmp_path / "out" / peft.TENSORS_FILE,
        running.frozen.geometry,
    )
    assert torch.equal(pulled["embeds"], codec.decode(tmp_path / "in")[1]["embeds"])
    assert antefix("prefix", "push", "soft", tmp_path / "out").stdout.startswith("soft@2 ")
    assert running.store.prefixes.read(running.store.prefixes.resolve(ref("soft@2")))[1]["embeds"].shape == (4, 48)


def test_a_foreign_pickle_is_converted_and_uploaded(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    expected = foreign.cartridge(tmp_path / "cache.pt", running.frozen.geometry, 6)
    for option in ("auto", "cartridge"):
        result = antefix("prefix", "import", "foreign", tmp_path / "cache.pt", "--format", option)
        assert (result.exit_code, result.stderr) == (0, "")
        assert "does not say which base model" in result.stdout
    versions = [running.store.prefixes.resolve(ref(f"foreign@{number}")) for number in (1, 2)]
    assert versions[0].digest == versions[1].digest
    manifest, tensors = running.store.prefixes.read(versions[0])
    assert torch.equal(tensors["self.kv"], expected)
    assert manifest.template is None


def test_import_reads_what_the_module_reads() -> None:
    assert {kind.value for kind in Foreign} == {pickled.AUTO, *pickled.READERS}


def test_a_template_goes_along(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    foreign.cartridge(tmp_path / "cache.pt", running.frozen.geometry, 6)
    folder = artefacts.write(artefacts.adapter(running.frozen), tmp_path / "in")
    option = ("--template", "Q: {prompt}\nA:")
    for command, path in (("import", tmp_path / "cache.pt"), ("push", folder)):
        assert antefix("prefix", command, f"template-{command}", path, *option).exit_code == 0
        version = running.store.prefixes.resolve(ref(f"template-{command}"))
        assert running.store.prefixes.read(version)[0].template == "Q: {prompt}\nA:"
        result = antefix("prefix", command, "untold", path, "--template", "no place")
        assert "must contain {prompt} exactly once" in result.stderr
    (tmp_path / "native").write_bytes(artefacts.native(running.frozen))
    assert "carries its own template" in antefix("prefix", "push", "untold", tmp_path / "native", *option).stderr
    assert "untold" not in antefix("prefix", "ls").stdout


def test_a_pickled_adapter_is_not_pushed_but_imported(
    antefix: Antefix, running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = running.frozen.geometry
    flat = torch.randn(4, geometry.kv_numbers_per_token)
    torch.save({"prompt_embeddings": flat}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    result = antefix("prefix", "push", "pickled", tmp_path)
    assert result.exit_code == 1
    assert "in a pickle, adapter_model.bin, which is not uploaded; try `antefix prefix import`" in result.stderr
    assert antefix("prefix", "import", "pickled", tmp_path).stdout.startswith("pickled@1 ")
    monkeypatch.chdir(tmp_path)
    assert antefix("prefix", "import", "pickled", ".").stdout.startswith("pickled@2 ")


def test_a_foreign_file_that_does_not_fit_is_refused_before_it_is_sent(
    antefix: Antefix, running: Running, tmp_path: Path
) -> None:
    torch.save(torch.zeros(10, 18432), tmp_path / "smileface_suffix.task0.weight")
    result = antefix("prefix", "import", "unfit", tmp_path / "smileface_suffix.task0.weight")
    assert result.exit_code == 1
    assert "smileface_suffix.task0.weight: the prefix: " in result.stderr
    assert "= 96 columns, got 18432" in result.stderr
    assert "unfit" not in antefix("prefix", "ls").stdout


@pytest.mark.parametrize("geometry", [{}, 7, {"family": "llama"}])
def test_a_server_that_does_not_tell_its_geometry_is_named(
    antefix: Antefix, instead: Instead, tmp_path: Path, geometry: Any
) -> None:
    torch.save(torch.zeros(10, 96), tmp_path / "f")
    instead(lambda request: httpx.Response(200, json={"geometry": geometry}))
    result = antefix("prefix", "import", "x", tmp_path / "f")
    assert result.exit_code == 1
    assert "does not answer as an antefix server: geometry must be an object" in result.stderr


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


def test_a_checkpoint_for_bart_arrives_with_its_three_stacks(
    antefix: Antefix, tmp_path: Path, instead: Instead
) -> None:
    geometry = tiny_frozen("bart").geometry
    stacks = ("self", "cross", "encoder")
    expected = foreign.li_liang_bart(tmp_path / "pytorch_model.bin", geometry, 4, stacks)
    sent: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/model":
            return httpx.Response(200, json={"geometry": geometry.to_json()})
        sent.append(request.read())
        made = {"id": "news", "version": 1, "digest": "0" * 64, "base_checked": False}
        return httpx.Response(201, json=made)

    instead(answer)
    result = antefix("prefix", "import", "news", tmp_path / "pytorch_model.bin")
    assert result.exit_code == 0, result.stderr
    native = tmp_path / "native"
    start = sent[0].index(b"\r\n\r\n", sent[0].index(b"prefix.safetensors")) + 4
    native.write_bytes(sent[0][start : sent[0].rindex(b"\r\n--")])
    manifest, tensors = codec.decode(native)
    assert (manifest.stacks, manifest.position_offset) == (stacks, 0)
    assert all((tensors[f"{stack}.kv"] - expected[stack]).abs().max() < 2e-6 for stack in stacks)
