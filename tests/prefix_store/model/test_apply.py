from __future__ import annotations

from functools import cache

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, BloomConfig, DynamicCache, GptOssConfig

from prefix_store.errors import ModelUnsupported
from prefix_store.geometry import ModelGeometry
from prefix_store.model import apply
from prefix_store.model.apply import PrefixRows
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import Window
from tests.models import CONTEXT, FAMILIES, VOCABULARY, WINDOW, random_kv, tiny_frozen, tiny_tokenizer

P, T = 5, 12
SLIDING = ("mistral", "phi3", "gemma2", "gemma3_text")
PEFT_FAMILIES = ("gpt2", "llama", "opt", "gpt_neox", "qwen3", "mistral", "gemma2")
# Observed: 0 against the cache, at most 3e-6 where the number of rows or the length of a product differs.
SAME, CLOSE = 1e-6, 2e-5
FAR = 0.1  # what a wrong prefix or position does at the very least; observed 1 to 6


@cache
def plain(family: str) -> FrozenModel:
    return tiny_frozen(family)


@cache
def attached(family: str) -> FrozenModel:
    return apply.attach(tiny_frozen(family))


def some_ids(rows: int = 2, length: int = T, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def with_prefix(
    family: str, ids: torch.Tensor, kv: torch.Tensor, offset: int = P, window: Window = Window.SLIDES
) -> torch.Tensor:
    rows = PrefixRows.shared(kv, len(ids), offset, window)
    return apply.logits(attached(family), ids, torch.ones_like(ids), rows)


def with_cache(family: str, ids: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """transformers alone: the prefix as a seeded cache, positions after it."""
    rows, length = ids.shape
    cached = DynamicCache()
    for layer, (key, value) in enumerate(kv):
        cached.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
    if mask is None:
        mask = torch.ones(rows, kv.shape[3] + length, dtype=torch.long)
    positions = torch.arange(kv.shape[3], kv.shape[3] + length).expand(rows, -1)
    return plain(family).model(ids, past_key_values=cached, attention_mask=mask, position_ids=positions).logits


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prefix_is_what_transformers_makes_of_a_seeded_cache(family):
    ids, kv = some_ids(), random_kv(plain(family), P)
    expected = with_cache(family, ids, kv)
    assert largest(with_prefix(family, ids, kv), expected) < SAME
    assert largest(with_prefix(family, ids, random_kv(plain(family), P, seed=1)), expected) > FAR
    assert largest(with_prefix(family, ids, kv, offset=0), expected) > FAR


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("family", PEFT_FAMILIES)
@torch.no_grad()
def test_a_prefix_is_what_peft_makes_of_it(family):
    ids, kv = some_ids(), random_kv(plain(family), P)
    peft_model = get_peft_model(
        tiny_frozen(family).model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    )
    flat = kv.permute(3, 0, 1, 2, 4).reshape(P, -1)
    peft_model.prompt_encoder["default"].embedding.weight.copy_(flat)
    expected = peft_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert largest(with_prefix(family, ids, kv), expected) < SAME
    assert largest(with_prefix(family, ids, kv.flip(0)), expected) > FAR


@pytest.mark.parametrize("family", SLIDING)
@torch.no_grad()
def test_a_window_leaves_a_sliding_prefix_behind_and_never_the_other(family):
    ids, kv = some_ids(), random_kv(plain(family), P)
    slides, always = (with_prefix(family, ids, kv, window=window) for window in Window)
    inside = WINDOW - P  # tokens that still see slot 0
    assert largest(slides[:, :inside], always[:, :inside]) < SAME
    assert largest(slides[:, inside:], always[:, inside:]) > FAR


@torch.no_grad()
def test_always_sees_every_slot_and_no_more_of_the_real_tokens():
    ids, kv = some_ids(), random_kv(plain("mistral"), P)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    real = (distance >= 0) & (distance < WINDOW)
    seen = torch.cat([torch.ones(T, P, dtype=torch.bool), real], dim=1)
    mask = torch.zeros(2, 1, T, P + T).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert largest(with_prefix("mistral", ids, kv, window=Window.ALWAYS), with_cache("mistral", ids, kv, mask)) < SAME


RAGGED = ((2, 12, "left"), (5, 7, "right"), (3, 9, "left"), (0, 10, "right"))  # virtual tokens, real tokens, padding


@pytest.mark.parametrize(
    ("family", "window"),
    [
        ("gpt2", Window.SLIDES),
        ("opt", Window.SLIDES),
        ("llama", Window.SLIDES),
        ("mistral", Window.SLIDES),
        ("mistral", Window.ALWAYS),
        ("gemma2", Window.SLIDES),
    ],
)
def test_a_ragged_batch_is_each_row_alone_forward_and_backward(family, window):
    model = attached(family)
    prefixes = [random_kv(model, length, seed).requires_grad_() for seed, (length, _, _) in enumerate(RAGGED)]
    texts = [some_ids(1, length, seed) for seed, (_, length, _) in enumerate(RAGGED)]
    ids, real = torch.full((len(RAGGED), T), 7), torch.zeros(len(RAGGED), T, dtype=torch.long)
    for row, (text, (_, length, side)) in enumerate(zip(texts, RAGGED, strict=True)):
        place = slice(T - length, T) if side == "left" else slice(0, length)
        ids[row, place], real[row, place] = text[0], 1
    lengths = [kv.shape[3] for kv in prefixes]
    batched = apply.logits(model, ids, real, PrefixRows.stack(prefixes, lengths, [window] * len(RAGGED)))
    together = torch.autograd.grad(batched[real.bool()].square().mean(), prefixes)

    single = [
        apply.logits(model, text, torch.ones_like(text), PrefixRows.shared(kv, 1, kv.shape[3], window))[0]
        for text, kv in zip(texts, prefixes, strict=True)
    ]
    alone = torch.autograd.grad(torch.cat(single).square().mean(), prefixes)

    for row, expected in enumerate(single):
        assert largest(batched[row, real[row].bool()], expected) < CLOSE
        assert lengths[row] == 0 or largest(together[row], alone[row]) < CLOSE
    assert largest(batched[0, real[0].bool()][:9], single[2]) > FAR
    assert largest(together[0], alone[2][:, :, :, :2]) > 100 * CLOSE


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prefix_made_from_text_is_that_text_in_context(family):
    ids, length = some_ids(1, 30), 2 * WINDOW  # longer than a window, of which a cache would keep no more
    kv = apply.prefill_kv(plain(family), ids[0, :length].tolist())
    assert kv.shape == random_kv(plain(family), length).shape
    expected = plain(family).model(ids).logits[:, length:]
    assert largest(with_prefix(family, ids[:, length:], kv, length), expected) < CLOSE
    assert largest(with_prefix(family, ids[:, length:], kv, 0), expected) > FAR


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_made_from_embeddings_is_those_embeddings_in_context_forward_and_backward(family):
    length = 2 * WINDOW  # longer than a window, of which a cache would keep no more
    model, ids = plain(family).model, some_ids()
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(length, 48, generator=generator).requires_grad_()
    both = torch.cat([embeds.expand(2, -1, -1), model.get_input_embeddings()(ids)], dim=1)
    expected = model(inputs_embeds=both).logits[:, length:]
    got = with_prefix(family, ids, apply.prefill_embeds(attached(family), embeds), length)
    wrong = with_prefix(family, ids, apply.prefill_embeds(attached(family), embeds), 0)
    there, here, elsewhere = (
        torch.autograd.grad(output.logsumexp(-1).mean(), embeds)[0] for output in (expected, got, wrong)
    )
    assert largest(got, expected) < CLOSE
    assert largest(here, there) < CLOSE * there.abs().max()
    assert largest(wrong, expected) > FAR
    assert largest(elsewhere, there) > FAR * there.abs().max()


@torch.no_grad()
def test_without_a_prefix_the_model_is_itself():
    ids = some_ids()
    got = apply.logits(attached("llama"), ids, torch.ones_like(ids), None)
    assert largest(got, plain("llama").model(ids).logits) < SAME


@torch.no_grad()
def test_rows_of_one_batch_may_differ_in_window():
    ids, kv = some_ids(), random_kv(plain("mistral"), P)
    rows = PrefixRows.stack([kv, kv], [P, P], [Window.ALWAYS, Window.SLIDES])
    got = apply.logits(attached("mistral"), ids, torch.ones_like(ids), rows)
    for row, window in enumerate([Window.ALWAYS, Window.SLIDES]):
        assert largest(got[row], with_prefix("mistral", ids, kv, window=window)[row]) < SAME


def test_logits_need_an_attached_model():
    with pytest.raises(RuntimeError, match="attach"):
        apply.logits(plain("llama"), some_ids(), torch.ones(2, T), None)


def test_attaching_again_changes_nothing():
    assert apply.attach(attached("llama")) is attached("llama")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        pytest.param(
            GptOssConfig(
                num_hidden_layers=2,
                hidden_size=32,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                intermediate_size=32,
                num_local_experts=2,
                num_experts_per_tok=1,
                vocab_size=VOCABULARY,
                max_position_embeddings=CONTEXT,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                pad_token_id=None,
            ),
            "s_aux",
            id="attention sinks",
        ),
        pytest.param(
            BloomConfig(n_layer=2, hidden_size=32, n_head=4, vocab_size=VOCABULARY, pad_token_id=None),
            "attention",
            id="attention of its own",
        ),
    ],
)
def test_a_model_that_a_prefix_would_not_reach_is_refused_and_left_as_it_was(config, reason):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    geometry = ModelGeometry(config.model_type, 2, 4, 2, 8, 32)
    frozen = FrozenModel(model, tiny_tokenizer(), geometry, "0" * 64, "strange", CONTEXT)
    with pytest.raises(ModelUnsupported, match=reason):
        apply.attach(frozen)
    assert model.config._attn_implementation == "eager"


def test_an_unknown_kind_of_layer_is_refused(monkeypatch):
    frozen = tiny_frozen("llama")
    monkeypatch.setattr(frozen.model.config, "layer_types", ["full_attention", "chunked_attention"], raising=False)
    with pytest.raises(ModelUnsupported, match="chunked_attention"):
        apply.attach(frozen)
