"""The share of attention on a prefix is what transformers' own softmax gives it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from prefix_store.model import apply, attended, stored
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import Method, PrefixManifest, Window
from tests.models import FAMILIES, WINDOW, random_kv, tiny_frozen, tiny_model

P = 5
TEXTS = [tuple(range(40, 51)), (7, 99, 3)]
WINDOWED = ("mistral", "gemma2", "gemma3_text", "phi3")


def manifest(frozen: FrozenModel, window: Window = Window.ALWAYS, length: int = P) -> PrefixManifest:
    return PrefixManifest(Method.PREFIX, frozen.geometry, length, position_offset=length, window=window)


@torch.no_grad()
def plain_weights(model: PreTrainedModel, kv: torch.Tensor, text: tuple[int, ...], window: Window) -> torch.Tensor:
    """`[L, Hq, T, P + T]` by eager attention over a cache that holds the prefix."""
    cache, length = DynamicCache(), kv.shape[3]
    for layer, (key, value) in enumerate(kv):
        cache.update(key[None], value[None], layer)
    output = model(
        torch.tensor([text]),
        attention_mask=masks(model, length, len(text)) if window is Window.ALWAYS else None,
        position_ids=torch.arange(length, length + len(text))[None],
        past_key_values=cache,
        use_cache=True,
        output_attentions=True,
    )
    return torch.cat(output.attentions)


def masks(model: PreTrainedModel, length: int, tokens: int) -> torch.Tensor | dict[str, torch.Tensor]:
    """Written out: causal, and where there is a window, through which the prefix alone is always seen."""
    distance = torch.arange(length, length + tokens)[:, None] - torch.arange(length + tokens)
    full = distance >= 0
    slid = full & ((distance < WINDOW) | (torch.arange(length + tokens) < length))
    kinds = {"full_attention": full, "sliding_attention": slid}
    added = {kind: torch.zeros(seen.shape).masked_fill(~seen, -1e30)[None, None] for kind, seen in kinds.items()}
    if model.config.model_type.startswith("gemma") and getattr(model.config, "sliding_window", None):
        return added
    return added["sliding_attention" if getattr(model.config, "sliding_window", None) else "full_attention"]


@pytest.mark.parametrize("window", Window)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_share_is_that_of_the_softmax_written_out(family, window):
    frozen = apply.attach(tiny_frozen(family))
    kv = random_kv(frozen, P, scale=0.5)
    made = manifest(frozen, window)
    rows = stored.rows_of(frozen, made, {"self.kv": kv}, kv)
    found = attended.shares(frozen, rows, TEXTS)
    weights = [plain_weights(tiny_model(family), kv, text, window) for text in TEXTS]
    on_prefix = [each[..., :P] for each in weights]
    shares = torch.cat([each.sum(3) for each in on_prefix], dim=2)
    assert (found.mean - shares.mean(2)).abs().max() < 1e-5
    last = torch.stack([each[:, :, -1].sum(2) for each in on_prefix]).mean(0)
    assert (found.last - last).abs().max() < 1e-5
    by_token = torch.cat(on_prefix, dim=2).mean((0, 1, 2))
    assert (found.by_token - by_token).abs().max() < 1e-5
    assert float(found.by_token.sum()) == pytest.approx(float(found.mean.mean()), abs=1e-5)
    other = attended.shares(frozen, stored.rows_of(frozen, made, {"self.kv": kv}, -kv), TEXTS)
    assert (other.mean - shares.mean(2)).abs().max() > 1e-3


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_that_slides_leaves_the_prefix_behind(family):
    frozen = apply.attach(tiny_frozen(family))
    kv = random_kv(frozen, P)
    last = [
        attended.shares(frozen, stored.rows_of(frozen, manifest(frozen, window), {}, kv), TEXTS[:1]).last[-1]
        for window in (Window.SLIDES, Window.ALWAYS)
    ]
    assert last[0].max() == 0
    assert last[1].min() > 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_nats_without_a_virtual_token_are_those_of_a_cache_without_it(family):
    """Its column is taken out of the keys and values; the text stays where it was."""
    frozen, model, text = apply.attach(tiny_frozen(family)), tiny_model(family), (7, 99, 3)
    kv = random_kv(frozen, P)
    found = attended.nats_without(frozen, manifest(frozen), kv, text)

    def alone(kept: list[int]) -> float:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(kv[:, :, :, kept]):
            cache.update(key[None], value[None], layer)
        positions = torch.arange(P, P + len(text))[None]
        logits = model(torch.tensor([text]), position_ids=positions, past_key_values=cache, use_cache=True).logits
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(text[1:]), reduction="sum"))

    with torch.no_grad():
        expected = [alone(list(range(P)))] + [alone([p for p in range(P) if p != out]) for out in range(P)]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert found.tolist() != pytest.approx(expected[1:] + expected[:1], abs=1e-2)


def test_a_slot_left_out_does_not_move_the_others_out_of_a_window():
    """Where the prefix slides, its slots keep their distance when one in their midst is not seen."""
    frozen = apply.attach(tiny_frozen("mistral"))
    kv = random_kv(frozen, WINDOW)
    rows = stored.without(kv, manifest(frozen, Window.SLIDES, WINDOW), torch.tensor([-1, 3]))
    whole, less = rows.visible(torch.arange(4).expand(2, -1), WINDOW)
    expected = whole.clone()
    expected[:, 3] = False
    assert torch.equal(less, expected)
    assert not torch.equal(less, whole)
