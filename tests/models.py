"""Tiny seeded models of every family, and a byte-level tokenizer, all made in code.

Weights are far larger than a fresh initialisation's, so a wrong position, mask or prefix moves logits by whole units.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MarianConfig,
    MBartConfig,
    MistralConfig,
    OPTConfig,
    PegasusConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from prefix_store.geometry import Stack
from prefix_store.model import frozen

torch.set_num_threads(1)  # models this small only lose by a second thread

BOS, EOS = 0, 1
VOCABULARY = 258  # <s>, </s> and the 256 bytes
CONTEXT = 512
WINDOW = 8
WEIGHT, BIAS = 0.15, 0.1

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
_DECODER: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "max_position_embeddings": CONTEXT,
}
_GROUPED: dict[str, Any] = {**_DECODER, "num_key_value_heads": 2}
_WIDE: dict[str, Any] = {**_GROUPED, "head_dim": 16}  # head size unlike hidden / heads
_SLIDE_LAST = ["full_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "gpt2": (GPT2Config, {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": CONTEXT}),
    "opt": (
        OPTConfig,
        {
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "ffn_dim": 80,
            "word_embed_proj_dim": 48,
            "max_position_embeddings": CONTEXT,
        },
    ),
    "gpt_neox": (GPTNeoXConfig, _DECODER),
    "llama": (LlamaConfig, _GROUPED),
    "qwen2": (Qwen2Config, _GROUPED),
    "qwen3": (Qwen3Config, _WIDE),
    "mistral": (MistralConfig, {**_GROUPED, "sliding_window": WINDOW}),
    "gemma": (GemmaConfig, _WIDE),
    "gemma2": (
        Gemma2Config,
        {
            **_WIDE,
            "sliding_window": WINDOW,
            "layer_types": _SLIDE_LAST,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 20.0,
        },
    ),
    "gemma3_text": (
        Gemma3TextConfig,
        {**_WIDE, "sliding_window": WINDOW, "layer_types": _SLIDE_LAST, "query_pre_attn_scalar": 10},
    ),
    "phi": (PhiConfig, _GROUPED),
    "phi3": (Phi3Config, {**_GROUPED, "sliding_window": WINDOW}),
}


# More layers in the decoder than in the encoder, and heads of another number and size.
_BOTH: dict[str, Any] = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": CONTEXT,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
    # no byte's, so that an end of text is where a tiny random model says so
    "pad_token_id": VOCABULARY,
    "vocab_size": VOCABULARY + 1,
}
# as published ones are; BART's are not scaled
_SCALED = {**_BOTH, "scale_embedding": True}
_T5: dict[str, Any] = {
    "d_model": 48,
    "d_kv": 12,  # heads * d_kv is not d_model
    "d_ff": 80,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 6,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": VOCABULARY,
    "pad_token_id": VOCABULARY,
    "vocab_size": VOCABULARY + 1,
}

ENCODER_DECODERS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "bart": (BartConfig, _BOTH),
    "mbart": (MBartConfig, _SCALED),
    "pegasus": (PegasusConfig, _SCALED),
    "marian": (MarianConfig, {**_SCALED, "decoder_vocab_size": VOCABULARY + 1}),
    "t5": (T5Config, _T5),
    "t5_gated": (T5Config, {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model of the family with eager attention; equal seeds give equal weights.

    `changes`: other numbers in its config.
    """
    config_class, numbers = {**FAMILIES, **ENCODER_DECODERS}[family]
    config = config_class(**{**_SHARED, **numbers, **changes})
    maker = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = maker.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(WEIGHT * noise)
            else:
                parameter.add_(BIAS * noise)
    return model.eval()


def tiny_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte; `bos` puts `<s>` in front by default, as Llama's tokenizer does and GPT-2's does not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": BOS, "</s>": EOS} | {letter: index for index, letter in enumerate(alphabet, start=2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_frozen(family: str = "llama", seed: int = 0, *, bos: bool = True) -> frozen.FrozenModel:
    """A tiny frozen model in memory; its digest follows from family and seed."""
    digest = hashlib.sha256(f"{family}/{seed}".encode()).hexdigest()
    return frozen.freeze(tiny_model(family, seed), tiny_tokenizer(bos=bos), digest=digest, name=f"tiny-{family}")


def save_tiny(family: str, folder: Path, seed: int = 0, *, bos: bool = True) -> Path:
    """Writes model and tokenizer as a Hugging Face folder and returns it."""
    tiny_model(family, seed).save_pretrained(folder)
    tiny_tokenizer(bos=bos).save_pretrained(folder)
    return folder


def random_kvs(
    model: frozen.FrozenModel, length: int, seed: int = 0, stacks: Sequence[Stack] = tuple(Stack)
) -> dict[Stack, torch.Tensor]:
    """Random canonical KV of `length` virtual tokens in each of an encoder-decoder model's stacks."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for stack in stacks:
        layers, two, heads, size = model.geometry.kv_shape_of(stack)
        found[stack] = torch.randn(layers, two, heads, length, size, generator=generator)
    return found


def random_kv(model: frozen.FrozenModel, length: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Random canonical KV `[L, 2, Hkv, P, D]` of `length` virtual tokens."""
    layers, two, heads, dim = model.geometry.kv_shape
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(layers, two, heads, length, dim, generator=generator)


def random_memory(model: frozen.FrozenModel, seed: int = 0, scale: float = 0.3) -> torch.Tensor:
    """A random canonical memory `[L, Hq, D, D]`, about as loud as what attention gives."""
    geometry = model.geometry
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(
        geometry.layers, geometry.query_heads, geometry.head_dim, geometry.head_dim, generator=generator
    )
