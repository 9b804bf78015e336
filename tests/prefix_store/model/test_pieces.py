"""Tokenizers that a checkpoint brings as sentencepiece files, of one side or of two."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from transformers import AutoTokenizer

from prefix_store.errors import ModelUnsupported
from prefix_store.model import frozen, prompt
from prefix_store.model.example import ExampleEncoder
from tests import pieces
from tests.models import tiny_tokenizer

# transformers recommends what it no longer uses
pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
ANSWER = "der König war im Haus"
ROLES = "{% for message in messages %}{{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pieces.save_marian(tmp_path_factory.mktemp("marian"))


@pytest.mark.parametrize("family", pieces.FILES)
def test_a_folder_with_one_sentencepiece_file_loads(family, tmp_path):
    cut = pieces.save_spiece(family, tmp_path)
    tokenizer = frozen.load(tmp_path).tokenizer
    text = "the queen was there"
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[: len(cut.encode(text))] == cut.encode(text, out_type=str)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_published_marian_loads(marian):
    loaded = frozen.load(marian)
    assert loaded.start_ids == (loaded.vocabulary_size - 1,)
    assert loaded.banned_ids == {loaded.vocabulary_size - 1}
    assert loaded.end_ids == {1}


def test_an_answer_is_cut_into_the_pieces_of_its_side(marian):
    tokenizer = AutoTokenizer.from_pretrained(marian)
    right = tokenizer(text_target=ANSWER).input_ids
    before = prompt.encode(tokenizer, "the king was there")
    assert prompt.encode_completion(tokenizer, ANSWER) == right != tokenizer(ANSWER).input_ids
    assert tokenizer.decode(right, skip_special_tokens=True) == ANSWER
    assert prompt.encode(tokenizer, "the king was there") == before  # a prompt's side is as it was


def test_training_learns_an_answer_in_the_pieces_of_its_side(marian):
    model = frozen.load(marian)
    encoder = ExampleEncoder(model.tokenizer, model.end_ids, chat_template=ROLES, start=model.start_ids)
    right = (*model.start_ids, *model.tokenizer(text_target=ANSWER).input_ids)
    chat = [{"role": "user", "content": "the king"}, {"role": "assistant", "content": ANSWER}]
    for example in ({"prompt": "the king", "completion": ANSWER}, {"messages": chat}):
        (found,) = encoder.encode(example, 100)
        assert found.ids == right
        assert found.source[:2] == tuple(model.tokenizer("the king").input_ids[:2])


def test_a_tokenizer_of_one_side_is_not_turned_around():
    class Turned(type(tiny_tokenizer())):
        def _switch_to_target_mode(self) -> None:
            raise AssertionError("others may be reading its special tokens")

    tokenizer: Any = Turned(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="</s>")
    assert prompt.encode_completion(tokenizer, "ab") == prompt.encode_completion(tiny_tokenizer(), "ab")


def test_all_that_a_tokenizer_may_be_kept_in_is_fetched_from_a_hub(monkeypatch):
    asked: list[str] = []

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ModelUnsupported, match="neither a folder nor a hub model"):
        frozen.load("somebody/opus-mt-en-de")
    for file in ("source.spm", "target.spm", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "merges.txt"):
        assert any(fnmatch.fnmatch(file, pattern) for pattern in asked), file
