"""The benchmark's own arithmetic and bookkeeping."""

from __future__ import annotations

import json

import pytest
import torch

from tests.bench import figures, goals, results
from tests.bench.results import Kept
from tests.bench.shapes import tokenizer
from tests.bench.workload import W

MEASURED = {
    "models": {
        "GPT-2 small, float32": {
            "median": {"antefix, mixed prefixes": 230.0, "PEFT, grouped by adapter": 23.0},
            "ratios": {"PEFT, grouped by adapter": 10.0},
        }
    },
    "goals": {},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    return tmp_path


def test_a_paired_ratio_is_the_median_of_neighbours():
    assert results.paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0


def test_percentiles_are_values_that_were_seen():
    values = [float(i) for i in range(1, 201)]
    assert results.percentiles(values, scale=10) == {"p50": 1000.0, "p90": 1800.0, "p99": 1980.0}
    assert results.percentile([3.0], 99) == results.percentile([3.0], 1) == 3.0


def test_a_goal_says_whether_it_was_met():
    assert goals.at_least(3.04, 3)["met"]
    assert not goals.at_most(2.5, 2, "steps")["met"]
    assert "| waiting | 2.5 steps | ≤ 2 steps |" in goals.table("", {"waiting": goals.at_most(2.5, 2, "steps")})


def test_the_readme_is_filled_from_the_results(folder):
    results.write("throughput", MEASURED)
    stored = json.loads((folder / "throughput.json").read_text())
    assert stored["conditions"]["versions"]["torch"] == torch.__version__
    for old in ("", "old\n"):
        text = figures.rendered(f"x\n<!-- figures: throughput -->\n{old}<!-- end of figures -->\ny")
        assert "| PEFT, grouped by adapter | 23 (10.00×) |" in text
        assert "old" not in text
        assert figures.rendered(text) == text
    with pytest.raises(SystemExit, match="no block"):
        figures.rendered("x")


def test_a_section_that_was_never_measured_leaves_its_block_empty(folder):
    text = "<!-- figures: flat -->\n<!-- end of figures -->"
    assert figures.rendered(text) == text


def test_the_readme_has_a_block_for_every_section():
    text = "".join(page.read_text() for page in figures.PAGES)
    assert {match[2] for match in figures.BLOCK.finditer(text)} == set(figures.SHOWN)


def test_results_hold_until_what_was_measured_changes(folder, monkeypatch):
    assert not results.is_current("throughput")
    results.write("throughput", MEASURED)
    assert results.is_current("throughput")
    monkeypatch.setattr(results, "_git", lambda *_: "another commit of the same code")
    assert results.is_current("throughput")
    monkeypatch.setattr(results, "sources", lambda: "other code")
    assert not results.is_current("throughput")


def test_finished_parts_are_not_measured_again(tmp_path, monkeypatch):
    asked = []

    def measure():
        asked.append(1)
        return {"a": (1, 2)}

    assert Kept("s", tmp_path).part("p", measure) == {"a": [1, 2]}
    assert Kept("s", tmp_path).part("p", measure) == {"a": [1, 2]}
    assert len(asked) == 1
    Kept("other", tmp_path).part("p", measure)
    monkeypatch.setattr(results, "sources", lambda: "other code")
    Kept("s", tmp_path).part("p", measure)
    assert len(asked) == 3
    Kept("s", tmp_path).clear()
    Kept("s", tmp_path).part("p", measure)
    assert len(asked) == 4


def test_the_workload_is_what_it_says():
    requests = W.items(50257)
    assert len(requests) == 64
    assert sorted({request.prefix for request in requests}) == list(range(32))
    assert all(16 <= len(request.prompt) <= 128 for request in requests)
    assert requests == W.items(50257)


def test_every_id_of_the_made_up_tokenizer_is_a_text_of_its_own():
    made = tokenizer(3000)
    assert len(made) == 3000
    texts = {made.decode([index]) for index in range(256, 3000)}
    assert len(texts) == 3000 - 256
    assert all(texts)
