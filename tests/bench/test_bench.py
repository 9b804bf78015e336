"""The benchmark's own arithmetic and bookkeeping, and a small sample of its check that all arms say the same."""

from __future__ import annotations

import json

import pytest
import torch

from tests.bench import arms, figures, results, throughput, workload


def test_a_paired_ratio_is_the_median_of_neighbours():
    assert results.paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0


def test_the_readme_is_filled_from_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    names = ["antefix, mixed prefixes", "a", "b", "c"]
    results.write(
        "throughput",
        {"median": dict.fromkeys(names, 100.0), "ratios": {"against a": 8.5, "against b": 2.0, "against c": 0.97}},
    )
    stored = json.loads((tmp_path / "throughput.json").read_text())
    assert stored["conditions"]["versions"]["torch"] == torch.__version__
    for old in ("", "old\n"):
        text = figures.rendered(f"x\n<!-- figures: throughput -->\n{old}<!-- end of figures -->\ny")
        assert "| a | 100 | 8.50× |" in text
        assert "old" not in text
        assert figures.rendered(text) == text
    with pytest.raises(SystemExit, match="no block"):
        figures.rendered("x")


def test_the_workload_is_what_it_says():
    requests = workload.items()
    assert len(requests) == 64
    assert sorted({request.prefix for request in requests}) == list(range(32))
    assert all(16 <= len(request.prompt) <= 128 for request in requests)
    assert requests == workload.items()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ours_and_pefts_tokens_are_the_same(monkeypatch):
    for module in (arms, workload):
        monkeypatch.setattr(module, "GPT2_SMALL", workload.GPT2_SMALL | {"n_embd": 96, "n_layer": 3})
    monkeypatch.setattr(arms, "NEW_TOKENS", 12)
    requests = workload.items()[:6]
    ours, peft = arms.Antefix(), arms.PeftSwitched()
    expected = peft.run(requests)
    assert throughput.same_tokens(ours.run(requests), expected, requests, peft) == 0
    wrong = [expected[1], expected[0], *expected[2:]]
    with pytest.raises(AssertionError, match="no tie"):
        throughput.same_tokens(wrong, expected, requests, peft)
