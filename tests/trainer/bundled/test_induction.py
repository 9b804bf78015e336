import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.bundled import induction

SHAPES = {"one KV head a query head": (5, 5), "shared KV heads": (4, 2)}
WORDS = 40


def model(heads: int, kv_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=320, num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=64, intermediate_size=256, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def told_twice() -> torch.Tensor:
    """`[8, 1 + 2 * WORDS]`: a mark, words in no order, the same words again."""
    draws = torch.Generator().manual_seed(3)
    words = torch.stack([torch.randperm(999, generator=draws)[:WORDS] + 1 for _ in range(8)])
    return torch.cat([torch.zeros(8, 1, dtype=torch.long), words, words], dim=1)


@torch.no_grad()
def copied(subject: LlamaForCausalLM) -> float:
    """How often the likeliest word, the present one aside, is the one that followed before."""
    ids = told_twice()
    logits = subject(ids).logits[:, WORDS + 1 : -1]
    logits.scatter_(2, ids[:, WORDS + 1 : -1, None], -math.inf)
    return float((logits.argmax(-1) == ids[:, WORDS + 2 :]).float().mean())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_fresh_model_copies_what_followed_before(shape):
    subject = model(*shape)
    assert copied(subject) < 0.05
    induction.install(subject, torch.Generator().manual_seed(1))
    assert copied(subject) > 0.6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_heads_look_where_they_should(shape):
    subject = model(*shape)
    induction.install(subject, torch.Generator().manual_seed(1))
    attentions = subject(told_twice(), output_attentions=True).attentions
    again = torch.arange(WORDS + 2, 2 * WORDS)
    group = shape[0] // shape[1]
    for number in range(min(induction.HEADS, shape[1])):
        before = attentions[induction.PREVIOUS][:, number * group]
        assert before.diagonal(-1, dim1=1, dim2=2).mean() > 0.7
        found = attentions[induction.SEARCHING][:, number * group][:, again, again - WORDS + 1]
        assert found.mean() > 0.5


def test_the_same_draws_give_the_same_heads():
    first = model(5, 5)
    second = copy.deepcopy(first)
    for subject in (first, second):
        induction.install(subject, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
