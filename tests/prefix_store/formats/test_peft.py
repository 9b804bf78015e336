import dataclasses
import json
import pickle

import pytest
import torch
from peft import (
    CartridgeConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import save

from prefix_store import codec
from prefix_store.errors import InvalidPrefix, InvalidRequest, PrefixMismatch
from prefix_store.formats import peft
from prefix_store.model.frozen import measure
from prefix_store.prefix import Method, Window
from prefix_store.tensors import PAYLOADS, validate
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
    "prompt": lambda: PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5),
    "p-tuning by MLP": lambda: PromptEncoderConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5, encoder_hidden_size=8
    ),
    "p-tuning by LSTM": lambda: PromptEncoderConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=5,
        encoder_hidden_size=8,
        encoder_reparameterization_type="LSTM",
    ),
}
SOFT = ("prompt", "p-tuning by MLP", "p-tuning by LSTM")
FAMILIES = ["gpt2", "llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "gpt_neox", "qwen3"))]
CONFIG = {
    "peft_type": "PREFIX_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": LENGTH,
    "num_layers": 2,
    "num_attention_heads": 2,
    "token_dim": 6,
    "num_transformer_submodules": 1,
}
SOFT_CONFIG = {**CONFIG, "peft_type": "PROMPT_TUNING", "num_attention_heads": 4, "token_dim": 12}


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


def soft_config(**changes):
    return json.dumps({**SOFT_CONFIG, **changes}).encode()


def stored(folder, geometry, native):
    """What an adapter's folder becomes in the store, by way of the native file."""
    native.write_bytes(codec.encode(*read_folder(folder, geometry)))
    return codec.decode(native)


@torch.inference_mode()
def logits(family, folder=None):
    """PEFT's own, of the last token."""
    model = tiny_model(family)
    model = model if folder is None else PeftModel.from_pretrained(model, folder).eval()
    return model(torch.tensor([[5, 9, 42, 7]])).logits[0, -1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapters_make_the_round_trip_through_the_store_bit_for_bit(tmp_path, family, kind):
    folder = adapter(family, kind, tmp_path / "saved")
    geometry = measure(tiny_model(family))
    read, values = stored(folder, geometry, tmp_path / "native")
    method = Method.PROMPT if kind in SOFT else Method.PREFIX
    assert (read.method, read.virtual_tokens, read.position_offset) == (method, 5, 5)
    assert (read.window, read.base_digest, read.geometry) == (Window.SLIDES, None, geometry)

    written = write_folder(tmp_path / "written", peft.write(read, values, "tiny", sliding_window=False))
    before, after = ((path / peft.TENSORS_FILE).read_bytes() for path in (folder, written))
    assert after == before
    assert torch.equal(logits(family, written), logits(family, folder))
    assert (logits(family, written) - logits(family)).abs().max() > 0.1


@pytest.mark.parametrize("kind", SOFT)
def test_a_soft_prompt_is_the_embeddings_that_peft_puts_in_front(tmp_path, kind):
    torch.manual_seed(0)
    tuned = get_peft_model(tiny_model("llama"), KINDS[kind]()).eval()
    tuned.save_pretrained(tmp_path)
    _, values = read_folder(tmp_path, measure(tiny_model("llama")))
    assert torch.equal(values["embeds"], tuned.get_prompt(batch_size=1)[0])


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


@pytest.fixture
def soft_file(tmp_path):
    path = tmp_path / "soft"
    embeds = torch.randn(LENGTH, GEOMETRY.hidden_size, generator=torch.Generator().manual_seed(0))
    path.write_bytes(save({"prompt_embeddings": embeds}))
    return path


@pytest.mark.parametrize("text", [None, soft_config(), soft_config(peft_type="P_TUNING"), soft_config(token_dim=None)])
def test_what_the_config_of_a_soft_prompt_does_not_say_the_tensor_decides(soft_file, text):
    read, values = peft.read(text, soft_file, GEOMETRY)
    assert (read.method, read.virtual_tokens, set(values)) == (Method.PROMPT, LENGTH, {"embeds"})


def test_a_width_with_two_meanings_needs_a_config(tmp_path):
    both = dataclasses.replace(GEOMETRY, hidden_size=COLUMNS)
    (tmp_path / "file").write_bytes(save({"prompt_embeddings": torch.ones(LENGTH, COLUMNS)}))
    with pytest.raises(InvalidPrefix, match="may be keys and values of this model as well as a soft prompt") as caught:
        peft.read(None, tmp_path / "file", both)
    assert caught.value.param == "config"
    for kind, method in peft.METHODS.items():
        assert peft.read(json.dumps({"peft_type": kind}).encode(), tmp_path / "file", both)[0].method is method


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (soft_config(num_virtual_tokens=6), InvalidPrefix, "num_virtual_tokens: expected 5, got 6"),
        (soft_config(num_transformer_submodules=2), InvalidPrefix, "num_transformer_submodules: expected 1, got 2"),
        (soft_config(task_type="SEQ_2_SEQ_LM"), InvalidPrefix, "task_type: expected CAUSAL_LM, got SEQ_2_SEQ_LM"),
        (soft_config(token_dim=16), PrefixMismatch, "token_dim: expected 12, got 16"),
        (soft_config(num_layers=3), PrefixMismatch, "num_layers: expected 2, got 3"),
        (soft_config(num_attention_heads=2), PrefixMismatch, "num_attention_heads: expected 4, got 2"),
        (config(), PrefixMismatch, "= 24 columns, got 12; a soft prompt has 12"),
    ],
)
def test_a_wrong_config_of_a_soft_prompt_is_refused(soft_file, text, error, message):
    with pytest.raises(InvalidPrefix, match=message) as caught:
        peft.read(text, soft_file, GEOMETRY)
    assert type(caught.value) is error


def test_keys_and_values_are_no_soft_prompt(file):
    with pytest.raises(PrefixMismatch, match="soft prompts have 12 columns, got 24; keys and values have 24"):
        peft.read(soft_config(), file, GEOMETRY)


def test_a_soft_prompt_has_two_axes_and_finite_values(tmp_path):
    flaws = {"got \\[5, 12, 1\\]": torch.ones(5, 12, 1), "finite": torch.full((5, 12), torch.nan)}
    for message, tensor in flaws.items():
        (tmp_path / "file").write_bytes(save({"prompt_embeddings": tensor}))
        with pytest.raises(InvalidPrefix, match=message):
            peft.read(soft_config(), tmp_path / "file", GEOMETRY)


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
        (config(peft_type=None), InvalidPrefix, "peft_type: expected PREFIX_TUNING or CARTRIDGE or PROMPT_TUNING or"),
        (config(peft_type=["LORA"]), InvalidPrefix, "peft_type"),
        *(
            (config(peft_type=kind), InvalidPrefix, f"or P_TUNING, got {kind}")
            for kind in ("LORA", "IA3", "CPT", "MULTITASK_PROMPT_TUNING")
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


def test_an_adapter_of_another_model_does_not_fit(tmp_path):
    folder = adapter("gpt2", "prefix", tmp_path / "saved")
    with pytest.raises(PrefixMismatch):
        read_folder(folder, measure(tiny_model("llama")))


@pytest.mark.parametrize(
    ("changes", "sliding_window", "message"),
    [
        ({"method": Method.PREFIX_PLUS}, False, "a prefix_plus prefix is neither keys and values nor embeddings"),
        ({"method": Method.PROMPT, "window": Window.ALWAYS}, True, "slide out of sight"),
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
        (Method.PROMPT, Window.ALWAYS, False),
        (Method.PROMPT, Window.SLIDES, True),
    ],
)
def test_what_means_the_same_in_peft_is_exported(tmp_path, method, window, sliding_window):
    exported = manifest(method, window=window)
    values = tensors(exported)
    files = peft.write(exported, values, "tiny", sliding_window=sliding_window)
    assert files == peft.write(exported, values, "tiny", sliding_window=sliding_window)
    folder = write_folder(tmp_path / "written", files)
    payload = PAYLOADS[method]
    assert torch.equal(read_folder(folder, GEOMETRY)[1][payload], values[payload])
    assert json.loads(files[peft.CONFIG_FILE])["base_model_name_or_path"] == "tiny"
