from __future__ import annotations

import pytest

from prefix_store.errors import InvalidRequest
from prefix_store.model import prompt
from tests.models import BOS, EOS, tiny_tokenizer


def test_a_template_takes_the_prompt_in_its_place():
    assert prompt.render("a {b}", "Q: {prompt}\nA:") == "Q: a {b}\nA:"
    assert prompt.render("a", None) == "a"


def test_a_prompt_gets_the_tokenizers_own_beginning():
    assert prompt.encode(tiny_tokenizer(), "ab")[0] == BOS
    assert BOS not in prompt.encode(tiny_tokenizer(bos=False), "ab")


@pytest.mark.parametrize("bos", [True, False])
def test_an_empty_prompt_is_bos(bos):
    assert prompt.encode(tiny_tokenizer(bos=bos), "") == [BOS]


def test_an_empty_prompt_without_a_bos_is_refused():
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.bos_token = None
    with pytest.raises(InvalidRequest, match="no BOS"):
        prompt.encode(tokenizer, "")


def test_a_completion_begins_with_its_text_and_ends_with_eos():
    tokenizer = tiny_tokenizer()
    assert prompt.encode_completion(tokenizer, "ab") == [*tokenizer("ab").input_ids[1:], EOS]
    tokenizer.eos_token = None
    assert EOS not in prompt.encode_completion(tokenizer, "ab")
