import json
import zipfile

import pytest
import torch

from prefix_store.errors import InvalidPrefix, PrefixMismatch
from prefix_store.formats import pickled
from prefix_store.geometry import ModelGeometry
from prefix_store.prefix import Method
from tests.models import tiny_frozen
from tests.prefix_store import foreign

# of facebook/opt-2.7b
LARGE = ModelGeometry("opt", layers=32, query_heads=32, kv_heads=32, head_dim=80, hidden_size=2560)
GEOMETRY = tiny_frozen("gpt2").geometry
COLUMNS = GEOMETRY.kv_numbers_per_token
BUILDERS = {
    "peft-bin": foreign.crumb,
    "rinna": foreign.rinna,
    "li-liang": foreign.li_liang,
    "cartridge": foreign.cartridge,
}


class Trap:
    """An object whose pickle runs code as it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("kind", BUILDERS)
def test_what_a_file_holds_says_what_it_is(tmp_path, kind):
    expected = BUILDERS[kind](tmp_path / "file", GEOMETRY, 5)
    for asked in (kind, "auto"):
        manifest, tensors = pickled.read(tmp_path / "file", asked, GEOMETRY)
        assert torch.allclose(tensors["self.kv"], expected, atol=2e-6)
        assert (manifest.method, manifest.virtual_tokens, manifest.base_digest) == (Method.PREFIX, 5, None)


@pytest.mark.parametrize("kind", BUILDERS)
def test_what_is_of_another_kind_than_was_said_is_refused(tmp_path, kind):
    BUILDERS[kind](tmp_path / "file", GEOMETRY, 5)
    for other in BUILDERS:
        if other != kind:
            with pytest.raises(InvalidPrefix, match="expected"):
                pickled.read(tmp_path / "file", other, GEOMETRY)


def test_the_published_folder_is_the_one_that_the_tests_build():
    text = foreign.crumb_config(LARGE, 24)
    assert len(text) == 332  # bytes that the hub lists
    assert 4 * 24 * LARGE.kv_numbers_per_token == 15_728_640  # and its 15.7 MB of tensor


def test_a_peft_folder_is_read_by_its_config_or_without_one(tmp_path):
    expected = foreign.crumb(tmp_path / "folder", GEOMETRY, 5)
    file, config = tmp_path / "folder" / "adapter_model.bin", tmp_path / "folder" / "adapter_config.json"
    fields = json.loads(config.read_text())
    assert torch.equal(pickled.read(file, "auto", GEOMETRY)[1]["self.kv"], expected)
    config.write_text(json.dumps(fields | {"num_layers": 4}))
    for path in (file, file.parent):
        with pytest.raises(PrefixMismatch, match="num_layers: expected 3, got 4"):
            pickled.read(path, "auto", GEOMETRY)
    config.unlink()
    assert torch.equal(pickled.read(file.parent, "auto", GEOMETRY)[1]["self.kv"], expected)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", None])
def test_a_soft_prompt_is_read_too(tmp_path, kind):
    embeds = torch.randn(5, GEOMETRY.hidden_size)
    saved(tmp_path / "adapter_model.bin", {"prompt_embeddings": embeds})
    if kind:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    manifest, tensors = pickled.read(tmp_path, "auto", GEOMETRY)
    assert manifest.method is Method.PROMPT
    assert torch.equal(tensors["embeds"], embeds)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(tmp_path, legacy):
    trap = Trap(tmp_path / "sprung")
    path = saved(tmp_path / "file", {"prompt_embeddings": trap}, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InvalidPrefix, match="opening this pickle could run its code, so it is not opened"):
        pickled.load(path)
    assert not trap.path.exists()
    torch.load(path, weights_only=False)  # it was a trap
    assert trap.path.exists()


def test_a_module_is_no_plain_tensors(tmp_path):
    with pytest.raises(InvalidPrefix, match="not plain tensors"):
        pickled.load(saved(tmp_path / "file", torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 20, 300, -1, -30, -200])
def test_a_truncated_file_is_refused(tmp_path, legacy, keep):
    path = saved(tmp_path / "file", torch.randn(50, COLUMNS), _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InvalidPrefix, match=r"or a damaged one|not plain tensors"):
        pickled.load(path)


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x02}."])
def test_what_torch_did_not_write_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InvalidPrefix):
        pickled.read(tmp_path / "file", "auto", GEOMETRY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.full((5, COLUMNS), torch.nan), "every value must be finite"),
        (torch.full((5, COLUMNS), -torch.inf), "every value must be finite"),
        (torch.full((5, COLUMNS), 2e6), "at most 1e\\+06"),
        (torch.zeros(5, COLUMNS - 1), f"= {COLUMNS} columns, got {COLUMNS - 1}"),
        (torch.zeros(5 * COLUMNS), f"got \\[{5 * COLUMNS}\\]"),
        (torch.zeros(5, COLUMNS, dtype=torch.float64), "got torch.float64"),
        (torch.zeros(5, COLUMNS).to_sparse(), "expected a plain tensor"),
        (torch.zeros(5, COLUMNS, device="meta"), "expected a plain tensor"),
        (torch.zeros(1).expand(10**12, COLUMNS), "claims more numbers than the file has"),
        ({"a": torch.zeros(1).expand(10**12)}, "a: .* claims more numbers"),
        ({}, "it holds \\[\\]"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, "none of peft-bin, rinna, li-liang, cartridge: it holds"),
        ({"prompt_embeddings": {"deep": torch.zeros(1)}}, "prompt_embeddings: expected a tensor or a list of tensors"),
        ({"prompt_embeddings": [1, 2]}, "prompt_embeddings: expected a plain tensor"),
        ({"prompt_embeddings": [torch.zeros(5, COLUMNS)]}, "expected tensors, got a list as 'prompt_embeddings'"),
        ({"wte.weight": torch.zeros(5, 48)}, "expected wte.weight and"),
        ({"trainable_keys": torch.zeros(5, 48)}, "expected lists of tensors, got a tensor as 'trainable_keys'"),
        ({"trainable_keys": []}, "expected fixed_keys"),
        ({1: torch.zeros(5, COLUMNS)}, "expected a tensor or tensors by name, got dict"),
        ([torch.zeros(5, COLUMNS)], "got list"),
        ({str(index): torch.zeros(1) for index in range(1025)}, "at most 1024 names, got 1025"),
    ],
)
def test_tensors_that_are_no_prefix_are_refused(tmp_path, content, message):
    with pytest.raises(InvalidPrefix, match=message):
        pickled.read(saved(tmp_path / "file", content), "auto", GEOMETRY)


def test_a_forged_list_of_parameters_is_refused(tmp_path):
    for state in ({"_size": 10**18}, {"_size": 10**18, "_parameters": 7}, {"_parameters": {"0": 7}}):
        forged = torch.nn.ParameterList()
        forged.__dict__.pop("_parameters")
        forged.__dict__.update(state)
        with pytest.raises(InvalidPrefix):
            pickled.load(saved(tmp_path / "file", {"trainable_keys": forged}))


def test_a_file_over_the_limit_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    plain = saved(tmp_path / "plain", torch.zeros(100, COLUMNS))
    packed = tmp_path / "packed"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert packed.stat().st_size < 5000
    assert pickled.load(packed).shape == (100, COLUMNS)
    monkeypatch.setattr(pickled, "MAX_FILE", 100_000)
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("it was opened"))
    for path in (plain, packed):
        with pytest.raises(InvalidPrefix, match="expected at most 100000 bytes, got 1"):
            pickled.load(path)


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InvalidPrefix, match="expected a file, or a folder with adapter_model"):
            pickled.read(path, "auto", GEOMETRY)
