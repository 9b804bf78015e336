import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.text import UNFINISHED, Detokenizer, TextStream, decode
from tests.models import tiny_tokenizer

ALPHABET = "ab c\nÄß你好😀👩‍👩‍👧é€"
STOPS = ["ab", "abab", "b c", "你", "😀", "好a", "\n\n", "c Ä"]


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes, and merges that cut characters anywhere."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    merges = [(first, second) for first in alphabet[60:160:3] for second in alphabet[100:188:3]]
    vocabulary |= {first + second: len(vocabulary) + index for index, (first, second) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama's: spaces are `▁`, what is not in the vocabulary becomes `<0xNN>` tokens."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "Ä", "\n"]
    merges = [("▁", "a"), ("▁", "b"), ("▁", "c")]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(content=" ", left=1, right=0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS = {"bytes": tiny_tokenizer(), "byte_level": byte_level(), "sentencepiece": sentencepiece()}


def cut(text: str, stops: list[str], exempt: int = 0) -> str:
    """The definition: the text before the stop string that is complete first behind `exempt`, the longer one of two."""
    for end in range(exempt + 1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def stream(tokenizer: PreTrainedTokenizerFast, ids: list[int], prompt: list[int], stops: list[str]) -> list[str]:
    pieces, text = [], TextStream(tokenizer, prompt, stops)
    for token_id in ids:
        pieces.append(text.push(token_id))
        if text.stopped:
            return pieces
    return [*pieces, text.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_join_to_the_text_up_to_the_first_stop_string(kind: str) -> None:
    tokenizer, rng = TOKENIZERS[kind], random.Random(7)
    for _ in range(300):
        text = "".join(rng.choices(ALPHABET, k=rng.randrange(40)))
        stops = rng.sample(STOPS, rng.randrange(4))
        prompt = tokenizer("b" + text[::-1], add_special_tokens=False).input_ids
        ids = tokenizer("a" + text, add_special_tokens=False).input_ids
        expected = decode(tokenizer, prompt + ids).removeprefix(decode(tokenizer, prompt))
        pieces = stream(tokenizer, ids, prompt, stops)
        assert "".join(pieces) == cut(expected, stops)
        assert not any(UNFINISHED in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["bytes", "byte_level"])
def test_a_stop_string_that_is_complete_within_the_first_tokens_does_not_count(kind: str) -> None:
    tokenizer, rng = TOKENIZERS[kind], random.Random(5)
    passed_over = spanning = 0
    for _ in range(500):
        text = "".join(rng.choices("ab c\n你", k=rng.randrange(30)))
        stops = rng.sample(["ab", "abab", "b c", "你", "a你", "cab c", "c a"], 3)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        count = rng.randrange(20)
        early = len(decode(tokenizer, ids[:count]).rstrip(UNFINISHED))
        found = TextStream(tokenizer, (), stops, count)
        pieces = []
        for token_id in ids:
            pieces.append(found.push(token_id))
            if found.stopped:
                break
        shown = "".join([*pieces, found.finish()])
        assert shown == cut(text, stops, early)
        passed_over += shown != cut(text, stops)
        spanning += len(shown) < early
    assert passed_over > 50
    assert spanning > 5  # one that begins within them and is complete behind them counts


@pytest.mark.parametrize("kind", ["bytes", "byte_level"])
def test_random_tokens_join_to_what_decoding_them_at_once_gives(kind: str) -> None:
    """Half of these bytes are no characters, in runs far longer than the window."""
    tokenizer, rng = TOKENIZERS[kind], random.Random(11)
    for length in (1, 2, 3, 10, 63, 64, 65, 200):
        for low in (2, 150):
            ids = [rng.randrange(low, 256) for _ in range(length)]
            prompt = [rng.randrange(2, 256) for _ in range(9)]
            assert "".join(stream(tokenizer, ids, prompt, [])) == decode(tokenizer, ids)


def test_a_window_of_garbage_that_ends_within_a_character_loses_nothing() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = [tokenizer("é", add_special_tokens=False).input_ids[0]] * 150 + tokenizer(
        "é!", add_special_tokens=False
    ).input_ids
    assert "".join(stream(tokenizer, ids, [], [])) == decode(tokenizer, ids)


def test_text_comes_out_as_soon_as_it_is_certain() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer("aé ab", add_special_tokens=False).input_ids
    assert stream(tokenizer, ids, [], []) == ["a", "", "é", " ", "a", "b", ""]


def test_only_the_possible_beginning_of_a_stop_string_is_held_back() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer("xab aby", add_special_tokens=False).input_ids
    assert stream(tokenizer, ids, [], ["abz"]) == ["x", "", "", "ab ", "", "", "aby", ""]


def test_special_tokens_give_no_text_and_no_lost_space() -> None:
    tokenizer = TOKENIZERS["bytes"]
    assert stream(tokenizer, [0, *tokenizer("hi", add_special_tokens=False).input_ids, 1], [], []) == [
        "",
        "h",
        "i",
        "",
        "",
    ]
    llama = TOKENIZERS["sentencepiece"]
    ids = llama("a b", add_special_tokens=False).input_ids
    assert "".join(stream(llama, ids[1:], ids[:1], [])) == " b"


def test_a_character_that_the_prompt_began_is_not_shown_as_two_halves() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer("aé!", add_special_tokens=False).input_ids
    assert "".join(stream(tokenizer, ids[2:], ids[:2], [])) == UNFINISHED + "!"


def test_what_never_became_a_character_comes_at_the_end() -> None:
    tokenizer = TOKENIZERS["bytes"]
    detokenizer = Detokenizer(tokenizer)
    first, *_ = tokenizer("😀", add_special_tokens=False).input_ids
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == UNFINISHED


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_decoding_by_the_shorter_way_is_the_same(kind):
    tokenizer = TOKENIZERS[kind]
    for seed in range(50):
        draw = random.Random(seed)
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(12))]
        by_transformers = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert decode(tokenizer, ids) == by_transformers


def test_a_tokenizer_with_a_way_of_its_own_is_asked():
    class Shouting(PreTrainedTokenizerFast):
        def _decode(self, *args, **kwargs):
            return super()._decode(*args, **kwargs).upper()

    ids = tiny_tokenizer().encode("abc", add_special_tokens=False)
    shouting = Shouting(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    assert (decode(shouting, ids), decode(tiny_tokenizer(), ids)) == ("ABC", "abc")
