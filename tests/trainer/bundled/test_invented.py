import random

import pytest

from trainer.bundled.invented import LISTS, PATTERNS, SORTS, TABLES, Names, is_held_out


def names(held_out: bool = False, seed: int = 1) -> Names:
    return Names(random.Random(seed), held_out)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("sort", SORTS)
def test_every_name_lies_on_its_side_of_the_line(sort, held_out):
    draw = names(held_out)
    drawn = {draw.fill(f"{{{sort}}}") for _ in range(50)}
    assert len(drawn) > 25
    assert all(is_held_out(name) is held_out for name in drawn)


def test_the_line_parts_one_name_in_eight():
    draw = names()
    drawn = [draw._syllables() for _ in range(4000)]
    assert 0.1 < sum(map(is_held_out, drawn)) / len(drawn) < 0.15


def test_gaps_are_lists_choices_and_numbers():
    draw = names()
    filled = [draw.fill("{colour}, {a|b c}, {3..4}, {7..7:03}") for _ in range(50)]
    colours, choices, numbers, padded = (
        set(column) for column in zip(*(text.split(", ") for text in filled), strict=True)
    )
    assert colours <= set(LISTS["colour"])
    assert choices == {"a", "b c"}
    assert numbers == {"3", "4"}
    assert padded == {"007"}


def test_one_of_several_patterns():
    draw = names()
    assert {draw.fill(["x", "y"]) for _ in range(20)} == {"x", "y"}


def test_some_are_all_different():
    assert len(set(names().some("{goods}", 40))) == 40


def test_every_pattern_of_the_tables_can_be_filled():
    draw = names()
    patterns = [pattern for several in PATTERNS.values() for pattern in several]
    patterns += [domain["names"] for domain in TABLES["domains"]]
    patterns += [slot["value"] for domain in TABLES["domains"] for slot in domain["slots"]]
    patterns += [fact["value"] for fact in TABLES["facts"]]
    for pattern in patterns:
        text = draw.fill(pattern)
        assert text
        assert not set("{}|") & set(text)
