"""The arithmetic of the hundred users, and the parts of their authors' rows."""

from __future__ import annotations

from server.scheduler.messages import PrefixPayload
from tests.prove import users


def test_parts_are_disjoint_whole_and_always_the_same():
    rows = [{"prompt": str(index), "completion": "x"} for index in range(23)]
    parts = [users.part_of(rows, "mark_twain", part) for part in range(users.PARTS)]
    assert sorted(int(row["prompt"]) for part in parts for row in part) == list(range(23))
    assert {len(part) for part in parts} == {4, 5}
    assert parts == [users.part_of(rows, "mark_twain", part) for part in range(users.PARTS)]
    assert parts[0] != users.part_of(rows, "jack_london", 0)


def test_users_are_counted_against_the_bare_model_and_against_the_others():
    bare = [2.0, 2.0]
    by_user = [[[1.0, 2.5], [1.5, 2.5]], [[1.0, 1.0], [1.5, 1.75]]]
    found = users.count(bare, by_user)
    assert found["matrix"] == [[1.75, 2.0], [1.0, 1.625]]
    assert found["better_than_none"] == 1 + 2
    assert found["better_than_others"] == 1 + 0
    assert found["best_of_all"] == 1
    assert users.missed(found) == ["better_than_none", "better_than_others"]
    assert users.missed({**found, "better_than_none": 95, "better_than_others": 100}) == []


def test_the_table_shows_each_rows_best_in_bold():
    measured = {"authors": ["mark_twain", "jack_london"], **users.count([2.0, 2.0], [[[1.0], [1.5]], [[1.0], [1.5]]])}
    assert "| twain | 2.000 | **1.000** | 1.500 |" in users.table(measured)


def test_an_author_is_scored_once_for_the_same_prefixes(monkeypatch, tmp_path):
    scored = []
    monkeypatch.setattr(users, "PARTS", 1)
    monkeypatch.setattr(users, "_bits", lambda bench, author, prefixes: scored.append(author) or [2.0, 1.0, 1.5])
    prefixes = {author: PrefixPayload(author, 1, 1, True, None) for author in ("a", "b")}
    first = users._score(None, ["a", "b"], prefixes, tmp_path)
    assert users._score(None, ["a", "b"], prefixes, tmp_path) == first
    assert scored == ["a", "b"]
    users._score(None, ["a", "b"], {**prefixes, "b": PrefixPayload("c", 1, 1, True, None)}, tmp_path)
    assert scored == ["a", "b", "a", "b"]
