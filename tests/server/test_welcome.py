import json
import shlex

import pytest

from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import Method, PrefixVersion
from server import welcome

ADDRESS = "http://127.0.0.1:8000"


def versions(*names: str) -> list[PrefixVersion]:
    return [PrefixVersion("default", name, 1, "d" * 64, Method.PREFIX, 20, 100, 0.0) for name in names]


def bodies(line: str) -> list[dict[str, object]]:
    """What the shell would send, one by one."""
    words = shlex.split(line.replace(";", " ; "))
    return [json.loads(word) for word in words[words.index("in") + 1 : words.index(";")]]


def test_the_block_says_what_is_served_and_how_much_more_fits(frozen: FrozenModel) -> None:
    block = welcome.text(ADDRESS, frozen, versions("a", "b"), 1000, dtype="float32", open_mode=True)
    assert "tiny-llama, float32 on cpu, context 512" in block
    assert "a, b\n" in block
    assert "for 50 prefixes of 20 tokens" in block
    assert "open mode, one tenant" in block


def test_a_memory_has_no_length_to_count_in(frozen: FrozenModel) -> None:
    memory = PrefixVersion("default", "m", 1, "d" * 64, Method.PREFIX_PLUS, 0, 100, 0.0)
    block = welcome.text(ADDRESS, frozen, [memory], 1000, dtype="float32", open_mode=True)
    assert f"prefixes of {welcome.USUAL_LENGTH} tokens" in block
    block = welcome.text(ADDRESS, frozen, [memory, *versions("a")], 1000, dtype="float32", open_mode=True)
    assert "prefixes of 20 tokens" in block


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_faster_dtype_says_what_it_may_cost(frozen: FrozenModel, dtype: str) -> None:
    block = welcome.text(ADDRESS, frozen, [], 0, dtype=dtype, open_mode=True)
    assert f"tiny-llama, {dtype} (tokens may differ from float32's) on cpu" in block
    assert "differ" not in welcome.text(ADDRESS, frozen, [], 0, dtype="float32", open_mode=True)


def test_only_the_first_names_are_listed(frozen: FrozenModel) -> None:
    names = [f"p{index}" for index in range(welcome.SHOWN + 1)]
    block = welcome.text(ADDRESS, frozen, versions(*names), 0, dtype="float32", open_mode=False)
    assert "p7 …" in block
    assert "p8" not in block


def test_the_line_to_try_asks_two_prefixes_the_same() -> None:
    first, second = bodies(welcome.try_line(ADDRESS, ["a", "b", "c"], open_mode=True))
    assert (first.pop("prefix_id"), second.pop("prefix_id")) == ("a", "b")
    assert first == second
    assert first["temperature"] == 0


def test_the_bare_model_stands_in_for_a_second_prefix() -> None:
    first, second = bodies(welcome.try_line(ADDRESS, ["a"], open_mode=True))
    assert first["prefix_id"] == "a"
    assert "prefix_id" not in second
    (alone,) = bodies(welcome.try_line(ADDRESS, [], open_mode=True))
    assert "prefix_id" not in alone


def test_where_keys_are_needed_the_line_sends_one() -> None:
    assert '-H "Authorization: Bearer $ANTEFIX_API_KEY"' in welcome.try_line(ADDRESS, [], open_mode=False)
    assert "Authorization" not in welcome.try_line(ADDRESS, [], open_mode=True)
