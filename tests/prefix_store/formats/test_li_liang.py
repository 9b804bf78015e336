import dataclasses

import pytest
import torch

from prefix_store import codec
from prefix_store.errors import InvalidPrefix, PrefixMismatch
from prefix_store.formats import li_liang, pickled
from tests.models import tiny_frozen
from tests.prefix_store import foreign

GEOMETRY = tiny_frozen("gpt2").geometry
BART = tiny_frozen("bart").geometry
STACKS = ("self", "cross", "encoder")
LAST = "control_trans.2"


@pytest.fixture
def state(tmp_path):
    foreign.li_liang(tmp_path / "pytorch_model.bin", GEOMETRY, 5)
    return pickled.load(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("deep", [False, True])
def test_the_mlp_is_evaluated(tmp_path, deep):
    path = tmp_path / "pytorch_model.bin"
    expected = foreign.li_liang(path, GEOMETRY, 5, deep=deep)
    manifest, tensors = pickled.read(path, "li-liang", GEOMETRY)
    assert (tensors["self.kv"] - expected).abs().max() < 2e-6  # observed 5e-7
    assert expected.abs().max() > 1
    assert (manifest.virtual_tokens, manifest.position_offset) == (5, 5)


def test_every_part_of_the_checkpoint_counts(state):
    _, tensors = li_liang.read(state, GEOMETRY)
    for name in state:
        changed = state | {name: state[name] + 0.1}
        assert (li_liang.read(changed, GEOMETRY)[1]["self.kv"] - tensors["self.kv"]).abs().max() > 1e-3, name


def test_a_checkpoint_in_half_precision_is_evaluated_in_full(state):
    _, tensors = li_liang.read({name: tensor.half() for name, tensor in state.items()}, GEOMETRY)
    assert tensors["self.kv"].dtype is torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"wte.weight": torch.zeros(5, 47)}, PrefixMismatch, "wte.weight: expected shape .*48\\], got \\[5, 47\\]"),
        ({"wte.weight": torch.zeros(48)}, PrefixMismatch, "wte.weight"),
        ({"wte.weight": torch.zeros(0, 48)}, InvalidPrefix, "expected shape \\[virtual tokens"),
        ({f"{LAST}.weight": torch.zeros(288, 31)}, InvalidPrefix, f"{LAST}: expected a layer of 32 inputs"),
        ({f"{LAST}.bias": torch.zeros(287)}, InvalidPrefix, f"{LAST}: .* bias \\[287\\]"),
        ({f"{LAST}.weight": torch.zeros(290, 32), f"{LAST}.bias": torch.zeros(290)}, PrefixMismatch, "got 290"),
        ({f"{LAST}.bias": torch.full((288,), 1e7)}, InvalidPrefix, "at most 1e\\+06"),
        ({"wte3.weight": torch.zeros(5, 48)}, InvalidPrefix, "expected wte.weight and .*wte3.weight"),
        ({"wte2.weight": torch.zeros(5, 48)}, PrefixMismatch, "encoder-decoder"),
        ({"control_trans2.0.weight": torch.zeros(5, 48)}, PrefixMismatch, "encoder-decoder"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused(state, change, error, message):
    with pytest.raises(InvalidPrefix, match=message) as caught:
        li_liang.read(state | change, GEOMETRY)
    assert type(caught.value) is error


def test_a_checkpoint_without_all_its_parts_is_refused(state):
    for name in state:
        with pytest.raises(InvalidPrefix, match="and the weight and bias of control_trans"):
            li_liang.read({key: tensor for key, tensor in state.items() if key != name}, GEOMETRY)


def test_a_model_of_other_layers_is_another_model(state):
    with pytest.raises(PrefixMismatch, match="this model's keys and values need 2\\*4 layers"):
        li_liang.read(state, dataclasses.replace(GEOMETRY, layers=4))


@pytest.mark.parametrize("stacks", [STACKS, ("self", "encoder"), ("cross",)])
def test_each_stack_of_a_bart_has_its_own_mlp(tmp_path, stacks):
    path = tmp_path / "pytorch_model.bin"
    expected = foreign.li_liang_bart(path, BART, 5, stacks)
    manifest, tensors = pickled.read(path, pickled.AUTO, BART)
    assert set(tensors) == {f"{stack}.kv" for stack in stacks}
    for stack, kv in expected.items():
        assert (tensors[f"{stack}.kv"] - kv).abs().max() < 2e-6  # observed 5e-7
        assert kv.abs().max() > 1
    assert (manifest.virtual_tokens, manifest.position_offset, manifest.stacks) == (5, 0, stacks)
    path.write_bytes(codec.encode(manifest, tensors))
    assert codec.decode(path)[0] == manifest


def test_every_part_of_a_checkpoint_for_bart_counts(tmp_path):
    foreign.li_liang_bart(tmp_path / "file", BART, 5, STACKS)
    state = pickled.load(tmp_path / "file")
    _, tensors = li_liang.read(state, BART)
    owners = {"wte": "self", "wte2": "cross", "wte_enc": "encoder"}
    owners |= {"control_trans": "self", "control_trans2": "cross", "control_trans_enc": "encoder"}
    for name in state:
        _, found = li_liang.read(state | {name: state[name] + 0.1}, BART)
        moved = {stack for stack in STACKS if not torch.equal(found[f"{stack}.kv"], tensors[f"{stack}.kv"])}
        assert moved == {owners[name.split(".")[0]]}, name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"wte2.weight": torch.zeros(4, 48)}, InvalidPrefix, "as many virtual tokens in every stack, got \\[4, 5\\]"),
        ({"wte_enc.weight": torch.zeros(5, 47)}, PrefixMismatch, "wte_enc.weight: expected shape .*48\\]"),
        ({"control_trans2.4.bias": torch.zeros(5)}, InvalidPrefix, "expected wte2.weight and .*control_trans2.2"),
        ({"wte3.weight": torch.zeros(5, 48)}, InvalidPrefix, "expected wte.weight and .*wte3.weight"),
    ],
)
def test_what_is_no_checkpoint_for_bart_is_refused(tmp_path, change, error, message):
    foreign.li_liang_bart(tmp_path / "file", BART, 5, STACKS)
    with pytest.raises(InvalidPrefix, match=message) as caught:
        li_liang.read(pickled.load(tmp_path / "file") | change, BART)
    assert type(caught.value) is error


def test_an_encoder_of_other_layers_is_another_model(tmp_path):
    foreign.li_liang_bart(tmp_path / "file", BART, 5, STACKS)
    other = dataclasses.replace(BART, encoder=dataclasses.replace(BART.encoder, layers=4))
    with pytest.raises(PrefixMismatch, match="control_trans_enc: this model's keys and values need 2\\*4 layers"):
        li_liang.read(pickled.load(tmp_path / "file"), other)
