"""How near answers come to what was expected, by libraries that papers quote; they are an extra, `antefix[eval]`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from prefix_store.cli.client import fail

TEXT_METRICS = ("bleu", "rouge", "chrf")
METRICS = (*TEXT_METRICS, "loss")
ROUGE = ("rouge1", "rouge2", "rougeL")


def check_installed(metrics: Sequence[str]) -> None:
    """Ends the command, with how to install it, where a library that a metric needs is missing."""
    try:
        if {"bleu", "chrf"} & set(metrics):
            import sacrebleu  # noqa: F401
        if "rouge" in metrics:
            import rouge_score.rouge_scorer  # noqa: F401
    except ImportError as error:
        fail(f"{error.name} is not installed: pip install 'antefix[eval]', or ask for --metrics loss alone")


def of_texts(metrics: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores from 0 to 100 over all answers, each with one reference or more.

    BLEU (Papineni et al. 2002) and chrF (Popović 2015) are sacrebleu's, of the whole corpus; ROUGE-1, -2 and -L (Lin
    2004) are the mean F1 of the best reference, without stemming.
    """
    scores: dict[str, float] = {}
    if "bleu" in metrics:
        scores["bleu"] = _sacrebleu().BLEU().corpus_score(answers, _streams(references)).score
    if "rouge" in metrics:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(ROUGE))
        each = [scorer.score_multi(list(known), answer) for known, answer in zip(references, answers, strict=True)]
        scores |= {kind: 100 * fmean(score[kind].fmeasure for score in each) for kind in ROUGE}
    if "chrf" in metrics:
        scores["chrf"] = _sacrebleu().CHRF().corpus_score(answers, _streams(references)).score
    return scores


def _sacrebleu() -> Any:
    import sacrebleu.metrics

    return sacrebleu.metrics


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """The first reference of each answer, then the second, …; None where there are fewer."""
    most = max(len(known) for known in references)
    return [[known[place] if place < len(known) else None for known in references] for place in range(most)]
