"""The bundled model: bits per byte, whether what it writes are words, whether it copies what only its context says."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich import print as show
from rich.markup import escape
from rich.progress import track

from server.scheduler.sampling_params import SamplingParams
from tests.prove.bundled import Bench, data_folder, load
from trainer.bundled import corpus, records

SECTION = "model"
CONTINUATIONS, OPENING, LENGTH = 100, 12, 64  # how many, words given, tokens written
TABLES = 200
BARS = {"bits": 1.827, "known_words": 0.98, "copied_values": 0.9}  # at most, at least, at least
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
MANNERS = {
    "greedy": SamplingParams(max_tokens=LENGTH, temperature=0.0, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=LENGTH, temperature=0.8, top_p=0.95, ignore_eos=True),
}


def words(text: str) -> list[str]:
    """Lower-case words, apostrophes inside them kept."""
    return [word.lower().replace("’", "'") for word in WORD.findall(text)]


def known_words() -> set[str]:
    """Every word of the text that the model was trained on."""
    documents = corpus.shuffled_documents(data_folder() / "corpus", paragraphs=12, seed=1)
    return {word for document in track(documents, "words of the corpus", transient=True) for word in words(document)}


def openings() -> list[str]:
    """The first words of held-out paragraphs."""
    text = (data_folder() / "corpus" / "books_simple_valid.txt").read_text("utf-8")
    paragraphs = [line for line in text.split("\n") if len(line.split()) >= 2 * OPENING]
    chosen = random.Random(0).sample(paragraphs, CONTINUATIONS)
    return [" ".join(paragraph.split()[:OPENING]) for paragraph in chosen]


def whole_words(text: str) -> list[str]:
    """Words of a continuation, without the one that its last token may have cut."""
    return words(re.sub(r"[\w'’]+$", "", text))


def share_known(texts: Iterable[str], known: set[str]) -> float:
    """Share of words that the corpus has."""
    found = [word for text in texts for word in whole_words(text)]
    return sum(word in known for word in found) / len(found)


def share_copied(answers: Sequence[str], values: Sequence[Sequence[str]]) -> float:
    """Share of slot values that stand verbatim, as whole words, in the text about their record."""
    told = [
        re.search(rf"(?<!\w){re.escape(value)}(?!\w)", answer) is not None
        for answer, row in zip(answers, values, strict=True)
        for value in row
    ]
    return sum(told) / len(told)


def run() -> dict[str, Any]:
    """Measures, prints ten continuations of each manner and ten tables as they came, and returns the figures."""
    bench, known, given = Bench(), known_words(), openings()
    bits = corpus.held_out_bits(load().model, bench.model.tokenizer, data_folder() / "corpus", 400_000)
    shares = {}
    for manner, params in MANNERS.items():
        texts = bench.write(given, params)
        shares[manner] = share_known(texts, known)
        _print_ten(manner, zip(given, texts, strict=True))
    tables = list(records.table_rows(seed=9, count=TABLES, held_out=True))
    answers = bench.write(
        [table for table, _, _ in tables],
        SamplingParams(max_tokens=160, temperature=0.0),
        bench.prefixes()["tables"],
    )
    _print_ten("tables", zip([table for table, _, _ in tables], answers, strict=True))
    copied = share_copied(answers, [values for _, _, values in tables])
    return {"bits": bits, "known_words": shares, "copied_values": copied}


def missed(measured: dict[str, Any]) -> list[str]:
    """The bars that were not reached."""
    bars = {
        f"at most {BARS['bits']} bits per byte of unseen books": measured["bits"]["books_simple"] <= BARS["bits"],
        f"at least {BARS['known_words']:.0%} known words": min(measured["known_words"].values()) >= BARS["known_words"],
        f"at least {BARS['copied_values']:.0%} of values told": measured["copied_values"] >= BARS["copied_values"],
    }
    return [bar for bar, is_met in bars.items() if not is_met]


def table(measured: dict[str, Any]) -> str:
    """For the README."""
    rows = [(f"bits per byte, {name}, held out", f"{value:.3f}") for name, value in measured["bits"].items()]
    rows += [
        (
            f"words that the corpus has, {CONTINUATIONS} {manner} continuations of {LENGTH} tokens",
            f"{100 * share:.1f} %",
        )
        for manner, share in measured["known_words"].items()
    ]
    rows.append(
        (
            f"slot values of {TABLES} unseen records told verbatim, prefix `tables`",
            f"{100 * measured['copied_values']:.1f} %",
        )
    )
    return "\n".join(["| bundled model | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _print_ten(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    show(f"\n[bold]{title}[/bold], ten unedited:")
    for (given, text), _ in zip(pairs, range(10)):  # noqa: B905  (the first ten)
        show(f"[dim]{escape(given)}[/dim]{escape(text)}")
