"""Adapters of encoder-decoder models against PEFT's own forward."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

from prefix_store.errors import InvalidPrefix, InvalidRequest, PrefixMismatch
from prefix_store.formats import flat, peft, peft_seq2seq
from prefix_store.geometry import Stack
from prefix_store.model import apply, both, frozen, stored
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import Method, PrefixManifest
from prefix_store.tensors import PrefixTensors
from tests.models import tiny_model, tiny_tokenizer

# PEFT 0.21 still asks transformers 5.23 by a name that goes away
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TASK, P = "SEQ_2_SEQ_LM", 4
SOURCE, TARGET = torch.tensor([[5, 9, 30, 77]]), torch.tensor([[1, 50, 60]])
CLOSE, FAR = 2e-5, 0.05  # observed at most 4e-6, and 0.3 and more
LAYERS = [(2, 2), (3, 3), (4, 4), (4, 3)]
Shape = tuple[str, int, int]
SHAPES: list[Shape] = [(family, *layers) for family in ("bart", "t5") for layers in LAYERS]
SOFT = {
    "prompt": lambda: PromptTuningConfig(task_type=TASK, num_virtual_tokens=P),
    "p-tuning": lambda: PromptEncoderConfig(task_type=TASK, num_virtual_tokens=P, encoder_hidden_size=8),
}


def model_of(shape: Shape, **changes: Any):
    """Of a size that PEFT can give a prefix to: equal heads in both stacks, and as wide as the model."""
    family, encoder, decoder = shape
    if family == "t5":
        sizes = {"num_layers": encoder, "num_decoder_layers": decoder, "d_kv": 8}
    else:
        sizes = {"encoder_layers": encoder, "decoder_layers": decoder, "encoder_attention_heads": 6}
    return tiny_model(family, **{**sizes, **changes})


@cache
def attached(shape: Shape) -> FrozenModel:
    return apply.attach(frozen.freeze(model_of(shape), tiny_tokenizer(), digest="0" * 64, name="tiny"))


def saved(shape: Shape, config: Any, folder: Path) -> Path:
    """An adapter that PEFT itself has saved, loud enough to be heard."""
    torch.manual_seed(0)
    made = get_peft_model(model_of(shape), config)
    with torch.no_grad():
        for parameter in made.prompt_encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    made.save_pretrained(folder)
    return folder


@torch.inference_mode()
def by_peft(shape: Shape, folder: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(model_of(shape), folder).eval()
    return model(input_ids=SOURCE, decoder_input_ids=TARGET).logits


@torch.inference_mode()
def by_reference(shape: Shape, manifest: PrefixManifest, tensors: PrefixTensors) -> torch.Tensor:
    model = attached(shape)
    rows = stored.repeated(model, manifest, tensors, 1)
    return both.logits(model, SOURCE, torch.ones_like(SOURCE), TARGET, torch.ones_like(TARGET), rows)


def read(folder: Path, shape: Shape, **changes: Any) -> tuple[PrefixManifest, PrefixTensors]:
    config = json.loads((folder / peft.CONFIG_FILE).read_text()) | changes
    return peft.read(json.dumps(config).encode(), folder / peft.TENSORS_FILE, attached(shape).geometry)


def prefix_tuning() -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type=TASK, num_virtual_tokens=P)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapter_means_what_it_means_to_peft(tmp_path, shape):
    folder = saved(shape, prefix_tuning(), tmp_path)
    manifest, tensors = read(folder, shape)
    assert (manifest.method, manifest.virtual_tokens, manifest.position_offset) == (Method.PREFIX, P, P)
    assert manifest.stacks == (Stack.SELF,)
    right = by_peft(shape, folder)
    assert (by_reference(shape, manifest, tensors) - right).abs().max() < CLOSE
    whole = load_file(folder / peft.TENSORS_FILE)[peft.TENSOR]
    geometry = attached(shape).geometry
    plain = flat.by_layer(whole, geometry.kv_heads, geometry.head_dim)[: geometry.layers]
    assert (by_reference(shape, manifest, {flat.KV: plain}) - right).abs().max() > FAR


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_is_what_peft_reads(tmp_path, shape):
    geometry = attached(shape).geometry
    layers, two, heads, size = geometry.kv_shape
    kv = torch.randn(layers, two, heads, P, size, generator=torch.Generator().manual_seed(1))
    manifest = PrefixManifest(Method.PREFIX, geometry, P, position_offset=P)
    for name, content in peft.write(manifest, {flat.KV: kv}, "tiny", sliding_window=False).items():
        (tmp_path / name).write_bytes(content)
    assert (by_reference(shape, manifest, {flat.KV: kv}) - by_peft(shape, tmp_path)).abs().max() < CLOSE
    assert torch.equal(read(tmp_path, shape)[1][flat.KV], kv)


@pytest.mark.parametrize("kind", SOFT)
@pytest.mark.parametrize("shape", [("bart", 3, 3), ("t5", 2, 3)])
def test_a_soft_prompt_is_the_encoders(tmp_path, shape, kind):
    folder = saved(shape, SOFT[kind](), tmp_path / "theirs")
    manifest, tensors = read(folder, shape)
    assert (manifest.method, manifest.virtual_tokens, manifest.position_offset) == (Method.PROMPT, P, 0)
    right = by_peft(shape, folder)
    assert (by_reference(shape, manifest, tensors) - right).abs().max() < CLOSE
    others = load_file(folder / peft.TENSORS_FILE)[peft.TENSOR][P:]
    assert (by_reference(shape, manifest, {"embeds": others}) - right).abs().max() > FAR
    (tmp_path / "ours").mkdir()
    for name, content in peft.write(manifest, tensors, "tiny", sliding_window=False).items():
        (tmp_path / "ours" / name).write_bytes(content)
    assert (by_peft(shape, tmp_path / "ours") - right).abs().max() < CLOSE
    assert torch.equal(read(tmp_path / "ours", shape)[1]["embeds"], tensors["embeds"])


def test_a_decoder_with_more_layers_is_refused_as_peft_fails(tmp_path):
    shape = ("bart", 2, 3)
    folder = saved(shape, prefix_tuning(), tmp_path)
    with pytest.raises(IndexError):
        by_peft(shape, folder)
    with pytest.raises(PrefixMismatch, match="2 layers and the decoder has 3"):
        read(folder, shape)


def test_a_t5_whose_heads_are_not_as_wide_as_the_model_is_refused_as_peft_fails(tmp_path):
    model = tiny_model("t5", num_layers=3)
    torch.manual_seed(0)
    get_peft_model(model, prefix_tuning()).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="Sizes of tensors"):
        PeftModel.from_pretrained(tiny_model("t5", num_layers=3), tmp_path)(input_ids=SOURCE, decoder_input_ids=TARGET)
    with pytest.raises(PrefixMismatch, match="token_dim: expected 72"):
        peft.read(
            (tmp_path / peft.CONFIG_FILE).read_bytes(), tmp_path / peft.TENSORS_FILE, frozen.measure(tiny_model("t5"))
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_transformer_submodules": 1}, "num_transformer_submodules: expected 2, got 1"),
        ({"num_layers": 4}, "num_layers: expected 3, got 4"),
        ({"num_attention_heads": 4}, "num_attention_heads: expected 6, got 4"),
        ({"num_virtual_tokens": 5}, "num_virtual_tokens: expected 4, got 5"),
        ({"task_type": "CAUSAL_LM"}, "task_type: expected SEQ_2_SEQ_LM, got CAUSAL_LM"),
        ({"peft_type": "CARTRIDGE"}, "peft_type: expected PREFIX_TUNING or .*, got CARTRIDGE"),
    ],
)
def test_a_config_that_says_something_else_is_refused(tmp_path, changes, message):
    folder = saved(("bart", 3, 3), prefix_tuning(), tmp_path)
    with pytest.raises(InvalidPrefix, match=message):
        read(folder, ("bart", 3, 3), **changes)


def test_a_soft_prompt_needs_its_config(tmp_path):
    folder = saved(("bart", 3, 3), SOFT["prompt"](), tmp_path)
    with pytest.raises(InvalidPrefix, match="send that along"):
        peft.read(None, folder / peft.TENSORS_FILE, attached(("bart", 3, 3)).geometry)
    with pytest.raises(InvalidPrefix, match="num_virtual_tokens: expected 4, got 3"):
        read(folder, ("bart", 3, 3), num_virtual_tokens=3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stacks": (Stack.SELF, Stack.CROSS)}, "more than the decoder's own attention"),
        ({"position_offset": 0}, "start at another position"),
    ],
)
def test_what_peft_cannot_say_is_not_written(changes, reason):
    geometry = attached(("bart", 3, 3)).geometry
    manifest = PrefixManifest(Method.PREFIX, geometry, P, **{"position_offset": P, **changes})
    with pytest.raises(InvalidRequest, match=reason):
        peft.write(manifest, {}, "tiny", sliding_window=False)


def test_slots_are_dealt_as_peft_deals_them():
    found = {layers: [peft_seq2seq.slot_of(layer, layers) for layer in range(layers)] for layers in (2, 3, 4, 5)}
    assert found == {2: [0, 0], 3: [0, 2, 1], 4: [0, 2, 0, 2], 5: [0, 2, 4, 1, 3]}
