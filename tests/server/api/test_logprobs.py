from server.api import logprobs
from server.scheduler.messages import TokenLogprob
from tests.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
A, B = TOKENIZER("ab", add_special_tokens=False).input_ids
HALF = TOKENIZER("é", add_special_tokens=False).input_ids[0]


class SameText:
    """A tokenizer whose tokens all read the same."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "x"


def test_the_token_itself_is_always_among_the_top() -> None:
    (top,) = logprobs.render([TokenLogprob(A, -3.0, ((B, -0.5),))], TOKENIZER)["top_logprobs"]
    assert top == {"b": -0.5, "a": -3.0}


def test_a_token_without_text_of_its_own_goes_by_its_id() -> None:
    shown = logprobs.render([TokenLogprob(HALF, -1.0), TokenLogprob(0, -1.0)], TOKENIZER)
    assert shown["tokens"] == [f"token_id:{HALF}", "token_id:0"]
    assert shown["token_ids"] == [HALF, 0]


def test_tokens_that_read_the_same_are_all_shown() -> None:
    (top,) = logprobs.render([TokenLogprob(1, -1.0, ((1, -1.0), (2, -2.0)))], SameText())["top_logprobs"]
    assert top == {"x": -1.0, "token_id:2": -2.0}


def test_minus_infinity_becomes_a_number_that_json_has() -> None:
    shown = logprobs.render([TokenLogprob(A, float("-inf"))], TOKENIZER)
    assert shown["token_logprobs"] == [logprobs.LOWEST]
    assert shown["top_logprobs"] == [{"a": logprobs.LOWEST}]
