"""The proofs' own arithmetic, and a small sample of what they prove about the bundled model and prefixes."""

from __future__ import annotations

import math

import pytest

from prefix_store.model import apply
from server.scheduler.sampling_params import SamplingParams
from tests.prove import inspect, model, prefixes, soak, tables
from tests.prove.bundled import DATA, FOLDER, Bench, load
from trainer.bundled import prefix_data, records
from trainer.data import tokenize


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def test_words_keep_their_apostrophes_and_lose_what_the_last_token_cut():
    assert model.words("Don’t go -- 'tis 3 o'clock!") == ["don't", "go", "tis", "o'clock"]
    assert model.whole_words("He went ho") == ["he", "went"]
    assert model.whole_words("He went home.") == ["he", "went", "home"]
    assert model.share_known(["the catt sat.", "the cat."], {"the", "cat", "sat"}) == 0.8


def test_a_value_counts_only_as_it_stands():
    assert model.share_copied(["The Owl is a pub.", "a pub"], [["The Owl", "pub"], ["The owl", "pub"]]) == 0.75
    assert model.share_copied(["The Owl is public"], [["The Owl", "pub"]]) == 0.5


def test_own_is_best_only_where_it_is_for_every_text():
    good = {"a": {"none": 3.0, "a": 1.0, "b": 2.0}, "b": {"none": 3.0, "a": 2.0, "b": 1.0}}
    assert prefixes.own_is_best(good)
    assert not prefixes.own_is_best(good | {"b": {"none": 0.5, "a": 2.0, "b": 1.0}})


def test_the_matrix_shows_each_texts_best_in_bold():
    bits = {"a": {"none": 3.0, "a": 1.0, "b": 2.0}, "b": {"none": 3.0, "a": 2.0, "b": 1.25}}
    facts = {name: {"method": "prefix", "virtual_tokens": 16} for name in bits}
    shown = prefixes.table({"bits": bits, "facts": facts})
    assert "| `a` | prefix, 16 | 3.000 | **1.000** | 2.000 |" in shown
    assert "| `b` | prefix, 16 | 3.000 | 2.000 | **1.250** |" in shown


def test_bleu_counts_every_reference():
    answers = ["the cat sat on the mat", "a dog ran home today"]
    first, second = [["the cat sat on the mat"], ["nothing of the kind here"]], ["a dog ran home today"]
    assert tables.bleu(answers, [first[0], second]) == pytest.approx(100)
    assert tables.bleu(answers, [first[0], [first[1][0], second[0]]]) == pytest.approx(100)
    assert tables.bleu(answers, first) < 70


def test_the_engine_scores_a_completion_as_the_sum_of_its_tokens(bench):
    """A text in two halves: what the whole costs is what the first half costs and what the second costs after it."""
    tokenizer = bench.model.tokenizer
    whole, first = tokenize(
        tokenizer,
        [{"prompt": "", "completion": " The old man went home."}, {"prompt": "", "completion": " The old man"}],
        64,
    )
    rest = type(whole)(whole.ids, len(first.ids) - 1)  # a completion ends with the end mark, which `whole` has later
    scored = bench.nats([whole, type(whole)(whole.ids[: len(first.ids) - 1], 1), rest], [None] * 3)
    assert scored[0] == pytest.approx(scored[1] + scored[2], rel=1e-4)
    assert all(0 < nats < math.log(tokenizer.vocab_size) * len(whole.ids) for nats in scored)


def test_a_proof_says_what_it_missed():
    good = {"bits": {"books_simple": 1.5}, "known_words": {"greedy": 0.99, "sampled": 0.99}, "copied_values": 0.95}
    assert model.missed(good) == []
    assert len(model.missed(good | {"known_words": {"greedy": 0.99, "sampled": 0.9}, "copied_values": 0.5})) == 2
    assert prefixes.missed({"bits": {"a": {"none": 1.0, "a": 2.0}}}) == ["every text is told best by its own prefix"]
    assert (tables.missed({"bleu": 40.0}), len(tables.missed({"bleu": 39.9}))) == ([], 1)
    soaked = {"wrong_count": 0, "is_flat": True, "idle_after": True, "preemptions": 1, "evictions": 1}
    assert (soak.missed(soaked), len(soak.missed(soaked | {"wrong_count": 1, "preemptions": 0}))) == ([], 2)


def test_growth_is_the_slope_and_not_the_noise():
    flat = [(float(t), 1000 + (-1) ** t, 0) for t in range(100)]
    assert abs(soak.growth(flat)) < 0.001
    assert soak.growth([(t, 1000 + t, 0) for t, _, _ in flat]) == pytest.approx(74 / 1062, rel=0.01)


def test_a_ranking_is_judged_by_other_texts():
    """Virtual token 1 is missed by every text and 2 by none; 0 gets the most attention, and does harm."""
    measured = {
        "tokens": [10] * 6,
        "nats": [[20.0, 18.0, 25.0, 20.0]] * 6,
        "shares": [[0.5, 0.1, 0.3]] * 6,
    }
    found = inspect.compare(measured, ranked_on=2)
    assert (found["told_apart"], found["by_attention"], found["virtual_tokens"]) == (1.0, 0.0, 3)
    assert (found["highest"], found["lowest"]) == (pytest.approx(0.5), pytest.approx(-0.2))
    proof = {"read_back": {"a": 0.96}, "prefixes": {"a": found}}
    assert inspect.missed(proof) == []
    assert len(inspect.missed({"read_back": {"a": 0.9}, "prefixes": {"a": found | {"told_apart": 0.8}}})) == 2
    assert "| `a`, 3 | +0.5000 | -0.2000 | 100% | 0% | 96.0% |" in inspect.table(proof)


@pytest.mark.skipif(not DATA.is_dir(), reason="the texts are not at hand (shared/data)")
def test_a_sample_of_texts_misses_what_is_ranked_highest():
    bundled = apply.attach(load())
    chosen = next(prefix for prefix in prefix_data.PREFIXES if prefix.name == "speeches")
    texts = inspect.held_out(bundled, chosen)[:16]
    found = inspect.compare(inspect.measure(bundled, FOLDER / "prefixes" / "speeches.safetensors", texts), ranked_on=8)
    assert found["told_apart"] >= 0.75
    assert found["highest"] > found["lowest"]


@pytest.mark.slow
def test_a_sample_of_the_soak():
    measured = soak.run(minutes=0.1, clients=8, steady=3, churned=1, kv_slots=1024)
    assert measured["wrong"] == []
    assert measured["idle_after"]
    assert measured["done"]["ask"] > 0


def test_a_sample_of_unseen_records_is_told_with_its_values(bench):
    rows = list(records.table_rows(seed=9, count=12, held_out=True))
    prefix = bench.prefixes()["tables"]
    params = SamplingParams(max_tokens=160, temperature=0.0)
    values = [row[2] for row in rows]
    assert model.share_copied(bench.write([row[0] for row in rows], params, prefix), values) >= 0.8
    assert model.share_copied(bench.write([row[0] for row in rows], params), values) < 0.8
