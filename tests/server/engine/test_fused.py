"""Norms and rotations in C against transformers' own, and what is left as it was."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama import modeling_llama

from server.engine import compiled, fused
from tests.models import tiny_model

NORMED = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _compiler():
    if fused._library() is None:
        pytest.skip("no C compiler, so nothing is fused")


def norms(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer for layer in model.modules() if type(layer).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", NORMED)
def test_norms_give_what_they_gave(family, dtype):
    model = tiny_model(family).to(dtype)
    before = norms(model)
    with torch.no_grad():
        for layer in before:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2)))
    draws = torch.Generator().manual_seed(1)
    inputs = [3 * torch.randn(1, 70, len(layer.weight), generator=draws).to(dtype) for layer in before]
    with torch.inference_mode():
        expected = [layer(x) for layer, x in zip(before, inputs, strict=True)]
        assert fused.fuse(model) >= len(before)
        after = norms(model)
        assert {type(layer) for layer in after} == {fused.RMSNorm}
        for layer, x, wanted in zip(after, inputs, expected, strict=True):
            got = layer(x)
            assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
            assert torch.allclose(got.float(), wanted.float(), rtol=3 * torch.finfo(dtype).eps, atol=1e-6)
            assert not torch.allclose(layer(x + 1).float(), wanted.float(), rtol=0.05)
    assert not any(type(layer) is not fused.RMSNorm for layer in norms(model))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotation_is_transformers_own(dtype):
    draws = torch.Generator().manual_seed(0)
    q = torch.randn(1, 70, 12, 64, generator=draws).to(dtype).transpose(1, 2)
    angles = torch.randn(1, 70, 32, generator=draws).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected, _ = modeling_llama.apply_rotary_pos_emb(q, q, cos, sin)
    got = fused.rotate(q, cos, sin)
    assert got.shape == expected.shape
    assert torch.allclose(got.float(), expected.float(), rtol=0, atol=4 * torch.finfo(dtype).eps * 4)
    assert not torch.allclose(fused.rotate(q, sin, cos).float(), expected.float(), rtol=0, atol=0.1)


def test_one_models_attention_is_turned_and_nobody_elses():
    plain = modeling_llama.apply_rotary_pos_emb
    model, other = tiny_model("llama"), tiny_model("llama")
    fused.fuse(model)
    assert modeling_llama.apply_rotary_pos_emb is plain
    attention = model.model.layers[0].self_attn
    assert attention.forward.__func__.__globals__[fused.ROTATE] is not plain
    assert "forward" not in vars(other.model.layers[0].self_attn)


def test_a_rotation_of_neighbours_is_left_alone(monkeypatch):
    def neighbours(q, k, cos, sin, unsqueeze_dim=1):
        turned = [torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) for x in (q, k)]
        return tuple(x * cos[:, None] + y * sin[:, None] for x, y in zip((q, k), turned, strict=True))

    monkeypatch.setattr(modeling_llama, fused.ROTATE, neighbours)
    model = tiny_model("llama")
    assert fused.fuse(model) == len(norms(model))
    assert "forward" not in vars(model.model.layers[0].self_attn)


def test_a_head_that_is_turned_in_part_is_left_to_its_own_function():
    called = []

    def plain(*given):
        called.append(given)
        return given[:2]

    q, k, angles = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 3, 4)
    fused._rotate_both(plain, q, k, angles.cos(), angles.sin())
    assert len(called) == 1


def test_a_row_that_overflows_does_so_alone():
    layer = fused.RMSNorm(torch.nn.Identity(), torch.ones(48), 1e-6)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    sound = layer(x)
    x[1, 5] = torch.inf
    got = layer(x)
    assert not got[1].isfinite().all()
    assert torch.equal(got[[0, 2]], sound[[0, 2]])


def test_without_a_compiler_nothing_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(compiled, "_cache", lambda: tmp_path)
    fused._library.cache_clear()
    try:
        assert fused.fuse(tiny_model("llama")) == 0
    finally:
        fused._library.cache_clear()


def test_what_names_itself_a_norm_and_is_none_is_left_alone():
    class CenteredRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(16)), 1e-6

        def forward(self, x):
            return torch.nn.functional.layer_norm(x, (16,), self.weight)

    model = torch.nn.Sequential(torch.nn.Linear(16, 16), CenteredRMSNorm())
    assert fused.fuse(model) == 0
