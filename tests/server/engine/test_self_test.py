"""What cannot be served right is refused at load, with the reason."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from prefix_store.errors import ModelUnsupported
from prefix_store.model import frozen
from server.engine import self_test
from server.engine.engine import Engine
from server.engine.int8_linear import Int8Linear
from server.engine.kv_pool import KVPool
from server.engine.model_runner import ModelRunner
from server.scheduler.scheduler import Limits
from tests.models import FAMILIES, tiny_frozen, tiny_tokenizer
from tests.parity.harness import sampled

LIMITS = Limits(slots=512, rows=4, step_tokens=32, context_length=128, waiting=4)
SMALL = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
REFUSED = {
    "bloom": BloomConfig(**SMALL, hidden_size=48, n_layer=2, n_head=4, max_position_embeddings=64),
    "gptj": GPTJConfig(**SMALL, n_embd=48, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    "gpt_neo": GPTNeoConfig(
        **SMALL, hidden_size=48, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8
    ),
    "falcon": FalconConfig(**SMALL, hidden_size=48, num_hidden_layers=2, num_attention_heads=4),
}


def build(config: PreTrainedConfig) -> frozen.FrozenModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return frozen.freeze(model, tiny_tokenizer(), digest="0" * 64, name=config.model_type)


@pytest.mark.parametrize("family", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_models_outside_the_attention_interface_are_refused(family):
    with pytest.raises(ModelUnsupported, match=family):
        Engine(build(REFUSED[family]), LIMITS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_a_model_that_takes_its_own_way_with_attention_is_refused(dtype):
    served, int8 = tiny_frozen("llama"), dtype is torch.int8
    served.model.to(torch.bfloat16 if int8 else dtype)
    truths = self_test.plain_truths(served)
    served.model.model.layers[1].self_attn.layer_idx = 0  # two layers on one layer's keys: plausible, and wrong
    pool = KVPool(served.geometry, 256, dtype=served.dtype, device=torch.device("cpu"))
    with pytest.raises(ModelUnsupported, match="would be served wrong"):
        self_test.check(ModelRunner(served, pool, "cpu", int8=int8), truths)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_batch_are_refused(rope_type, tmp_path):
    config = LlamaConfig(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    config.rope_parameters["rope_type"] = rope_type
    with pytest.raises(ModelUnsupported, match="depend on its neighbours"):
        frozen._check_config(config)


@pytest.mark.parametrize("family", sampled(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_every_dtype_passes_with_its_own_tolerance(family, dtype):
    served, int8 = tiny_frozen(family), dtype is torch.int8
    served.model.to(torch.bfloat16 if int8 else dtype)
    engine = Engine(served, LIMITS, int8=int8)
    assert engine.pool.keys.dtype is (torch.bfloat16 if int8 else dtype)
    assert any(isinstance(module, Int8Linear) for module in served.model.modules()) == int8
