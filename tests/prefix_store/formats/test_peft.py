import json
import pickle

import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save

from prefix_store.errors import InvalidPrefix, InvalidRequest, PrefixMismatch
from prefix_store.formats import peft
from prefix_store.model.frozen import measure
from prefix_store.prefix import Method, Window
from prefix_store.tensors import validate
from tests.models import tiny_model
from tests.prefix_store.samples import GEOMETRY, LENGTH, manifest, tensors

# PEFT 0.21 still asks transformers 5.23 by a name that goes away
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

COLUMNS = GEOMETRY.kv_numbers_per_token
KINDS = {
    "prefix": lambda: PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5),
    "projected": lambda: PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8
    ),
    "cartridge": lambda: CartridgeConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5, num_frozen_tokens=2),
}
CONFIG = {
    "peft_type": "PREFIX_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": LENGTH,
    "num_layers": 2,
    "num_attention_heads": 2,
    "token_dim": 6,
    "num_transformer_submodules": 1,
}


def adapter(family, kind, folder):
    """An adapter that PEFT itself has saved; its numbers are random."""
    torch.manual_seed(0)
    get_peft_model(tiny_model(family), KINDS[kind]()).save_pretrained(folder)
    return folder


def read_folder(folder, geometry):
    return peft.read((folder / peft.CONFIG_FILE).read_bytes(), folder / peft.TENSORS_FILE, geometry)


def write_folder(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def flat():
    return torch.randn(LENGTH, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def file(tmp_path, flat):
    path = tmp_path / "file"
    path.write_bytes(save({"prompt_embeddings": flat}, {"format": "pt"}))
    return path


def config(**changes):
    return json.dumps({**CONFIG, **changes}).encode()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapters_make_the_round_trip_bit_for_bit(tmp_path, family, kind):
    folder = adapter(family, kind, tmp_path / "saved")
    base = tiny_model(family)
    read, values = read_folder(folder, measure(base))
    assert (read.method, read.virtual_tokens, read.position_offset) == (Method.PREFIX, 5, 5)
    assert (read.window, read.base_digest, read.geometry) == (Window.SLIDES, None, measure(base))

    written = write_folder(tmp_path / "written", peft.write(read, values, "tiny", sliding_window=False))
    original = load_file(folder / peft.TENSORS_FILE)["prompt_embeddings"]
    assert torch.equal(load_file(written / peft.TENSORS_FILE)["prompt_embeddings"], original)
    loaded = PeftModel.from_pretrained(base, written)
    assert torch.equal(loaded.prompt_encoder["default"].embedding.weight, original)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_canonical_keys_and_values_are_those_peft_gives_the_model(tmp_path, family):
    folder = adapter(family, "prefix", tmp_path / "saved")
    base = tiny_model(family)
    _, values = read_folder(folder, measure(base))
    cache = PeftModel.from_pretrained(base, folder).get_prompt(batch_size=1)
    for layer, (keys, numbers) in enumerate(zip(cache.layers, values["self.kv"], strict=True)):
        assert torch.equal(keys.keys[0], numbers[0]), layer
        assert torch.equal(keys.values[0], numbers[1]), layer
        assert not torch.equal(keys.values[0], numbers[0])


def test_the_layout(file, flat):
    _, values = peft.read(None, file, GEOMETRY)
    layers, _, heads, size = GEOMETRY.kv_shape
    for layer in range(layers):
        for which in (0, 1):
            for head in range(heads):
                begin = (2 * layer + which) * heads * size + head * size
                assert torch.equal(values["self.kv"][layer, which, head], flat[:, begin : begin + size])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_kept(tmp_path, flat, dtype):
    (tmp_path / "file").write_bytes(save({"prompt_embeddings": flat.to(dtype)}))
    read, values = peft.read(config(), tmp_path / "file", GEOMETRY)
    assert values["self.kv"].dtype is dtype
    files = peft.write(read, values, "tiny", sliding_window=True)
    assert files[peft.TENSORS_FILE] == save({"prompt_embeddings": flat.to(dtype)}, {"format": "pt"})


@pytest.mark.parametrize(
    "text", [None, b'{"peft_type": "PREFIX_TUNING"}', config(), config(num_layers=None), config(peft_type="CARTRIDGE")]
)
def test_what_the_config_does_not_say_the_tensor_decides(file, text):
    read, values = peft.read(text, file, GEOMETRY)
    assert read.virtual_tokens == LENGTH
    validate(read, values)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (config(num_virtual_tokens=6), InvalidPrefix, "num_virtual_tokens: expected 5, got 6"),
        (config(num_virtual_tokens=5.0), InvalidPrefix, "num_virtual_tokens: expected 5, got 5.0"),
        (config(num_transformer_submodules=2), InvalidPrefix, "num_transformer_submodules: expected 1, got 2"),
        (config(num_transformer_submodules=True), InvalidPrefix, "expected 1, got True"),
        (config(num_layers=3), PrefixMismatch, "num_layers: expected 2, got 3"),
        (config(num_attention_heads=4), PrefixMismatch, "num_attention_heads: expected 2, got 4"),
        (config(token_dim=12), PrefixMismatch, "token_dim: expected 6, got 12"),
        (config(task_type="SEQ_2_SEQ_LM"), InvalidPrefix, "task_type: expected CAUSAL_LM, got SEQ_2_SEQ_LM"),
        (config(peft_type=None), InvalidPrefix, "peft_type: expected PREFIX_TUNING or CARTRIDGE, got None"),
        (config(peft_type=["LORA"]), InvalidPrefix, "peft_type"),
        *(
            (config(peft_type=kind), InvalidPrefix, f"expected PREFIX_TUNING or CARTRIDGE, got {kind}")
            for kind in ("PROMPT_TUNING", "P_TUNING", "LORA", "IA3")
        ),
        (b"", InvalidPrefix, "not valid JSON"),
        (b"[]", InvalidPrefix, "expected a JSON object"),
        (b"[" * 60_000, InvalidPrefix, "nested too deeply"),
        (b'{"num_layers": 2, "num_layers": 3}', InvalidPrefix, "stands twice"),
        (b" " * 70_000, InvalidPrefix, "at most 65536 bytes"),
    ],
)
def test_a_wrong_config_is_refused(file, text, error, message):
    with pytest.raises(InvalidPrefix, match=message) as caught:
        peft.read(text, file, GEOMETRY)
    assert type(caught.value) is error
    assert caught.value.param == "config"


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (save({"prompt_embeddings": torch.zeros(5, COLUMNS + 1)}), PrefixMismatch, "= 24 columns, got 25"),
        (save({"prompt_embeddings": torch.zeros(5, GEOMETRY.hidden_size)}), PrefixMismatch, "soft prompt"),
        (save({"prompt_embeddings": torch.zeros(0, COLUMNS)}), InvalidPrefix, "got \\[0, 24\\]"),
        (save({"prompt_embeddings": torch.zeros(COLUMNS)}), InvalidPrefix, "got \\[24\\]"),
        (save({"prompt_embeddings": torch.full((5, COLUMNS), torch.nan)}), InvalidPrefix, "finite"),
        (save({"prompt_embeddings": torch.zeros(5, COLUMNS, dtype=torch.int64)}), InvalidPrefix, "expected dtype"),
        (save({"lora_A.weight": torch.zeros(5, COLUMNS)}), InvalidPrefix, "got \\['lora_A.weight'\\]"),
        (save({"prompt_embeddings": torch.zeros(5, COLUMNS), "x": torch.zeros(1)}), InvalidPrefix, "'x'"),
        (pickle.dumps({"prompt_embeddings": torch.zeros(5, COLUMNS)}), InvalidPrefix, "pickle and zip"),
        (b"", InvalidPrefix, "not a safetensors file"),
    ],
)
def test_a_wrong_tensor_file_is_refused(tmp_path, content, error, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InvalidPrefix, match=message) as caught:
        peft.read(None, tmp_path / "file", GEOMETRY)
    assert type(caught.value) is error


def test_a_soft_prompt_that_peft_saved_is_refused_by_name(tmp_path):
    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    model.save_pretrained(tmp_path)
    with pytest.raises(InvalidPrefix, match="got PROMPT_TUNING"):
        read_folder(tmp_path, GEOMETRY)


def test_an_adapter_of_another_model_does_not_fit(tmp_path):
    folder = adapter("gpt2", "prefix", tmp_path / "saved")
    with pytest.raises(PrefixMismatch):
        read_folder(folder, measure(tiny_model("llama")))


@pytest.mark.parametrize(
    ("changes", "sliding_window", "message"),
    [
        ({"method": Method.PROMPT}, False, "a prompt prefix is not per-layer keys and values"),
        ({"method": Method.PREFIX_PLUS}, False, "a prefix_plus prefix is not"),
        ({"position_offset": 0}, False, "another position"),
        ({"template": "Say: {prompt}"}, False, "template"),
        ({"window": Window.ALWAYS}, True, "slide out of sight"),
    ],
)
def test_what_peft_cannot_say_is_not_exported(changes, sliding_window, message):
    unfit = manifest(**changes)
    with pytest.raises(InvalidRequest, match=message) as caught:
        peft.write(unfit, tensors(unfit), "tiny", sliding_window=sliding_window)
    assert not isinstance(caught.value, InvalidPrefix)


@pytest.mark.parametrize(
    ("method", "window", "sliding_window"),
    [
        (Method.PREFIX, Window.ALWAYS, False),
        (Method.TEXT, Window.ALWAYS, False),
        (Method.PREFIX, Window.SLIDES, True),
    ],
)
def test_keys_and_values_are_exported_where_they_mean_the_same(tmp_path, method, window, sliding_window):
    exported = manifest(method, window=window)
    values = tensors(exported)
    files = peft.write(exported, values, "tiny", sliding_window=sliding_window)
    assert files == peft.write(exported, values, "tiny", sliding_window=sliding_window)
    folder = write_folder(tmp_path / "written", files)
    assert torch.equal(read_folder(folder, GEOMETRY)[1]["self.kv"], values["self.kv"])
    assert json.loads(files[peft.CONFIG_FILE])["base_model_name_or_path"] == "tiny"
