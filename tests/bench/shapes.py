"""The shapes of model that are measured, made in code with seeded random weights: speed does not depend on them."""

from __future__ import annotations

import itertools
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from prefix_store.model.frozen import FrozenModel, freeze

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@dataclass(frozen=True)
class Shape:
    """A family of models and its numbers, by the names that transformers gives them."""

    name: str
    config: type[PreTrainedConfig]
    numbers: Mapping[str, int | float | bool | None]

    @property
    def vocabulary(self) -> int:
        """Token ids there are."""
        return int(self.numbers["vocab_size"] or 0)

    def changed(self, **numbers: float) -> Shape:
        """The same family with other numbers."""
        return replace(self, numbers={**self.numbers, **numbers})

    def model(
        self, attention: str, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
    ) -> PreTrainedModel:
        """Equal arguments give equal weights, which are drawn on the device."""
        torch.manual_seed(seed)
        config = self.config(**{**self.numbers, **NO_TOKENS})  # type: ignore[arg-type]
        maker = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device(device):
            model = maker.from_config(config, attn_implementation=attention, dtype=dtype)
        return model.eval().requires_grad_(False)

    def frozen(self, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> FrozenModel:
        """The model as the engine takes it, without a tokenizer."""
        return freeze(self.model("eager", dtype, seed, device), None, digest="bench", name=self.name)

    def save(self, folder: Path) -> None:
        """Writes a model folder that a server can load."""
        self.model("eager").save_pretrained(folder)
        tokenizer(self.vocabulary).save_pretrained(folder)


def parameters(model: PreTrainedModel) -> int:
    """How many numbers the model has; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Bytes, and then made-up words of three letters, so that every id is a text."""
    words = map("".join, itertools.product(("Ġ", ""), *[string.ascii_lowercase] * 3))
    texts = itertools.islice(itertools.chain(sorted(pre_tokenizers.ByteLevel.alphabet()), words), vocabulary)
    model = Tokenizer(BPE(vocab={text: index for index, text in enumerate(texts)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model)


def _grouped(name: str, **numbers: Any) -> Shape:
    return Shape(name, LlamaConfig, {"max_position_embeddings": 8192, "tie_word_embeddings": False, **numbers})


GPT2_SMALL = Shape(
    "GPT-2 small", GPT2Config, {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
)
# Its head is not the embeddings: with random weights those would make every answer one token over and over. Weights are
# as large as keeps the scale of what they multiply: with smaller ones no token would depend on the encoder.
BART_BASE = Shape(
    "BART base",
    BartConfig,
    {
        "d_model": 768,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 12,
        "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072,
        "max_position_embeddings": 1024,
        "vocab_size": 50265,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
        "tie_word_embeddings": False,
        "init_std": 0.04,
    },
)
LLAMA_150M = _grouped(
    "Llama 150 M",
    hidden_size=768,
    num_hidden_layers=16,
    num_attention_heads=12,
    num_key_value_heads=4,
    intermediate_size=2048,
    vocab_size=32000,
)
LLAMA_19M = _grouped(
    "Llama 19 M",
    hidden_size=384,
    num_hidden_layers=8,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=1024,
    vocab_size=8192,
)
# As their makers publish them.
GPT2_MEDIUM = Shape(
    "gpt2-medium", GPT2Config, {"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024, "vocab_size": 50257}
)
QWEN3_600M = Shape(
    "Qwen3-0.6B",
    Qwen3Config,
    {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
)
LLAMA2_7B = _grouped(
    "Llama-2-7B",
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    intermediate_size=11008,
    vocab_size=32000,
    max_position_embeddings=4096,
)
