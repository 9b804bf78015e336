import json

import pytest

from prefix_store.errors import InvalidRequest
from server.api import reading
from server.api.reading import look_through


@pytest.mark.parametrize("body", ['{"a": 1, "a": 2}', '{"x": [{"b": {"a": 1, "a": 1}}]}', '{"a": 1, "\\u0061": 2}'])
def test_a_name_twice_is_refused_however_deep(body: str) -> None:
    with pytest.raises(InvalidRequest, match="'a' is given more than once") as caught:
        look_through(body.encode())
    assert caught.value.param == "a"


def test_the_same_name_in_two_objects_is_none_twice() -> None:
    look_through(b'{"a": {"a": 1}, "b": [{"a": 1}, {"a": 1}]}')


@pytest.mark.parametrize("item", ["{}", "1", "-1.5e3"])
def test_objects_and_numbers_are_counted(item: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_VALUES", 10)
    look_through(f"[{','.join([item] * 10)}]".encode())
    with pytest.raises(InvalidRequest, match="more than 10 values"):
        look_through(f"[{','.join([item] * 11)}]".encode())


def test_lists_and_texts_are_counted_by_their_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_LISTS", 3)
    monkeypatch.setattr(reading, "MOST_QUOTES", 4)
    look_through(b'[[], [], "a", "b"]')
    for body in (b"[[], [], []]", b'["a", "b", "c"]'):
        with pytest.raises(InvalidRequest):
            look_through(body)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000, b'{"a": NaN}'])
def test_what_is_no_json_is_left_to_the_one_who_can_say_why(body: bytes) -> None:
    look_through(body)


def test_the_bounds_let_the_largest_training_set_through() -> None:
    """A hundred thousand examples of eight messages."""
    example = {"messages": [{"role": "user", "content": "x"}] * 8}
    look_through(json.dumps({"examples": [example] * 100_000}).encode())
