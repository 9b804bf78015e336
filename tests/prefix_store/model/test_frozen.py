from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM, NoBadWordsLogitsProcessor

from prefix_store.errors import ModelUnsupported
from prefix_store.geometry import EncoderGeometry
from prefix_store.model import apply, frozen
from server.engine.engine import Engine
from server.scheduler.limits import Limits
from tests.models import (
    BOS,
    CONTEXT,
    ENCODER_DECODERS,
    EOS,
    FAMILIES,
    save_tiny,
    tiny_frozen,
    tiny_model,
    tiny_tokenizer,
)


@pytest.fixture
def folder(tmp_path):
    return save_tiny("llama", tmp_path / "tiny")


@pytest.mark.parametrize(("family", "kv_heads", "head_dim"), [("gpt2", 6, 8), ("llama", 2, 8), ("qwen3", 2, 16)])
def test_geometry_is_read_off_the_cache(family, kv_heads, head_dim):
    geometry = tiny_frozen(family).geometry
    assert (geometry.family, geometry.layers, geometry.query_heads) == (family, 3, 6)
    assert (geometry.kv_heads, geometry.head_dim, geometry.hidden_size) == (kv_heads, head_dim, 48)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_model_wants_no_gradients_and_drops_nothing_out(family):
    model = tiny_frozen(family)
    assert not model.model.training
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert model.context_length == CONTEXT


def test_a_loaded_folder_is_the_model_that_was_saved(folder):
    loaded = frozen.load(folder, name="mine")
    ids = torch.arange(2, 12)[None]
    assert loaded.name == "mine"
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    assert torch.equal(loaded.model(ids).logits, tiny_model("llama")(ids).logits)
    assert loaded.tokenizer.decode(loaded.tokenizer("é!").input_ids, skip_special_tokens=True) == "é!"


def test_a_folder_names_its_model_unless_told(folder):
    assert frozen.load(folder).name == "tiny"


def test_the_digest_follows_weights_and_config_alone(folder, tmp_path):
    before = frozen.digest_of(folder)
    (folder / "README.md").write_text("words")
    (folder / "tokenizer_config.json").write_text("{}")
    assert frozen.digest_of(folder) == before
    other = save_tiny("llama", tmp_path / "other", seed=1)
    assert frozen.digest_of(other) != before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert frozen.digest_of(folder) != before


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelUnsupported, match="no such folder"):
        frozen.load(tmp_path / "absent")


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_decoder_model_is_measured_on_both_sides(family, tmp_path):
    model = frozen.load(save_tiny(family, tmp_path))
    is_t5 = family.startswith("t5")
    assert model.is_encoder_decoder
    assert model.geometry.kv_shape == (3, 2, 6, 12 if is_t5 else 8)
    assert model.geometry.encoder == EncoderGeometry(2, *((6, 12) if is_t5 else (4, 12)))
    assert model.context_length == CONTEXT
    assert model.start_id == model.model.config.decoder_start_token_id
    assert model.end_ids == {EOS}


def test_a_decoder_only_model_has_no_encoder(folder):
    assert not frozen.load(folder).is_encoder_decoder


@pytest.mark.parametrize("kind", frozen.BATCH_DEPENDENT_ROPE)
def test_positions_that_depend_on_the_batch_are_refused(folder, kind):
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    with pytest.raises(ModelUnsupported, match="neighbours"):
        frozen.load(folder)


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    save_tiny("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelUnsupported, match=r"lacks 1 of the model's weights, such as .*layers\.1\.mlp\.up_proj"):
        frozen.load(tmp_path)


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    save_tiny("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelUnsupported, match="cannot load the model"):
        frozen.load(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelUnsupported, match="sees no GPU"):
        frozen.load(save_tiny("llama", tmp_path), device="cuda")


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_answer_begins_and_ends_by_the_rules_of_the_generation_config(family):
    model = tiny_frozen(family)
    assert (model.start_ids, model.last_id, model.banned_ids) == ((model.start_id,), None, frozenset())
    rules = {"forced_bos_token_id": 7, "forced_eos_token_id": [9, 4], "bad_words_ids": [[5], [6, 8]]}
    model.model.generation_config.update(**rules)
    assert (model.start_ids, model.last_id, model.banned_ids) == ((model.start_id, 7), 4, {5})
    assert model.is_relative == (family == "t5")


@pytest.mark.parametrize("ends", [1, [1, 9]])
def test_an_end_is_not_banned_as_a_bad_word_as_in_transformers(ends):
    model, scores = tiny_frozen("bart"), torch.zeros(1, 259)
    words = [[1], [9], [5], [6, 8]]
    model.model.generation_config.update(eos_token_id=ends, bad_words_ids=words)
    expected = NoBadWordsLogitsProcessor(words, ends)(torch.zeros(1, 1, dtype=torch.long), scores)
    assert model.banned_ids == set(expected[0].isinf().nonzero().flatten().tolist()) == {5, 9} - set(model.end_ids)


def forget(folder, *names):
    """Makes both of a folder's configs name none of these."""
    for file in ("config.json", "generation_config.json"):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | dict.fromkeys(names)))


def test_an_answer_begins_with_bos_where_no_start_is_configured(tmp_path):
    forget(save_tiny("bart", tmp_path), "decoder_start_token_id")
    loaded = frozen.load(tmp_path)
    answer = loaded.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
    assert loaded.start_ids == (answer[0, 0].item(),) == (BOS,)


def test_a_model_with_nothing_for_an_answer_to_begin_with_is_refused(tmp_path):
    forget(save_tiny("bart", tmp_path), "decoder_start_token_id", "bos_token_id")
    with pytest.raises(ModelUnsupported, match=r"bart: .* neither a decoder_start_token_id nor a bos_token_id"):
        frozen.load(tmp_path)


@pytest.mark.parametrize("kind", ["led", "m2m_100", "umt5", "longt5"])
def test_an_encoder_decoder_model_of_another_make_is_refused_with_those_that_are_served(kind, tmp_path):
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    with pytest.raises(ModelUnsupported, match=f"^{kind}: .* families are served: bart, mbart, pegasus, marian, t5, "):
        frozen.load(tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in frozen.ENCODER_DECODERS if kind not in ENCODER_DECODERS])
def test_a_family_that_is_served_takes_prefixes(kind, tmp_path):
    """Those that no other test has a model of."""
    config = tiny_model("t5" if kind == "mt5" else "bart").config.to_dict()
    del config["model_type"], config["architectures"]
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING[kind](**config)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    Engine(frozen.load(tmp_path), Limits(256, 4, 16, 64, 4))  # which tests itself
    assert apply.attach(frozen.load(tmp_path)).geometry.family == kind
