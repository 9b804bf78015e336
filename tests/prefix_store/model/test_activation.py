import pytest
import torch

from prefix_store.model import activation
from tests.models import tiny_model


@pytest.mark.parametrize("kind", activation.TANH_GELU)
def test_the_fused_activation_is_the_same_function(kind):
    x = torch.linspace(-12, 12, 4001)
    model = torch.nn.Sequential(kind())
    expected = model(x)
    assert activation.fuse(model) == 1
    assert float((model(x) - expected).abs().max()) < 2e-6
    assert float((torch.nn.GELU()(x) - expected).abs().max()) > 1e-4  # the other GELU would show


def test_every_layer_of_a_gpt2_is_replaced_and_a_llama_is_left_alone():
    gpt2 = tiny_model("gpt2")
    assert activation.fuse(gpt2) == gpt2.config.n_layer
    assert activation.fuse(gpt2) == 0
    assert activation.fuse(tiny_model("llama")) == 0
