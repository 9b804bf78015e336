from __future__ import annotations

import pytest

from prefix_store.errors import ChatTemplateMissing, InvalidRequest
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


def test_a_text_that_has_its_special_tokens_gets_no_others():
    assert prompt.encode(tiny_tokenizer(), "<s>a", special_tokens=False) == prompt.encode(tiny_tokenizer(), "a")


def test_messages_are_written_by_the_tokenizers_own_template_unless_another_is_given():
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(ChatTemplateMissing):
        prompt.render_chat(tokenizer, messages)
    tokenizer.chat_template = "{{ messages[0].content }}!{% if add_generation_prompt %}>{% endif %}"
    assert prompt.render_chat(tokenizer, messages) == "hi!>"
    assert prompt.render_chat(tokenizer, messages, "{{ bos_token }}?") == "<s>?"


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[3].content + 1 }}", "{{ 1 / 0 }}"])
def test_messages_that_a_template_does_not_take_are_refused(template):
    with pytest.raises(InvalidRequest, match="the chat template does not take these messages"):
        prompt.render_chat(tiny_tokenizer(), [{"role": "user", "content": "hi"}], template)


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
