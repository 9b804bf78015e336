import sys

import pytest
import typer

from prefix_store.cli import scores

TEXTS = ["the cat sat on the mat", "two red birds sing here"]


def test_equal_texts_score_a_hundred_and_others_less() -> None:
    references = [[TEXTS[0]], ["something else", TEXTS[1]]]  # as many as there are, and the best one counts
    perfect = scores.of_texts(scores.METRICS, TEXTS, references)
    assert perfect == pytest.approx(dict.fromkeys(("bleu", "rouge1", "rouge2", "rougeL", "chrf"), 100.0))
    worse = scores.of_texts(scores.METRICS, [TEXTS[0], "a dog"], references)
    assert all(worse[name] < 90 for name in worse)


def test_scores_are_those_of_hand_made_sums() -> None:
    """Of "a b c d" against "a c b d": 4 of 4 words, 0 of 3 pairs, a common run of 3."""
    found = scores.of_texts(["rouge"], ["a b c d"], [["a c b d"]])
    assert found == pytest.approx({"rouge1": 100.0, "rouge2": 0.0, "rougeL": 75.0})


def test_only_what_is_asked_for_is_made() -> None:
    assert set(scores.of_texts(["chrf"], TEXTS, [TEXTS, TEXTS])) == {"chrf"}


@pytest.mark.parametrize(
    ("missing", "metrics", "fails"),
    [
        ("sacrebleu", ["bleu"], True),
        ("sacrebleu", ["chrf"], True),
        ("sacrebleu", ["rouge", "loss"], False),
        ("rouge_score", ["rouge"], True),
        ("rouge_score", ["bleu", "loss"], False),
    ],
)
def test_a_missing_library_is_one_line_that_says_how_to_get_it(
    missing: str, metrics: list[str], fails: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"{missing}.rouge_scorer", raising=False)
    if not fails:
        scores.check_installed(metrics)
        return
    with pytest.raises(typer.Exit):
        scores.check_installed(metrics)
    said = capsys.readouterr().err
    assert said.startswith(f"antefix: {missing}")
    assert "pip install 'antefix[eval]'" in said
    assert said.count("\n") == 1
