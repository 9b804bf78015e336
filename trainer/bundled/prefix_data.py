"""Writes the training text of the bundled prefixes.

`python -m trainer.bundled.prefix_data --corpus FOLDER --out FOLDER`: the corpus folder holds `corpus/` (see corpus.py)
and `authors/`; the tables come from records.py. Each prefix gets `NAME/train.jsonl` and `NAME/dev.jsonl`; a row is
`{"prompt", "completion"}`, and the completion opens with the space or line break before it. Training rows stay clear of
the text that was held out from the bundled model; dev rows are made of it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.bundled import records
from trainer.bundled.corpus import SOURCES

ROWS = {"train": 400, "dev": 60}
GENERATED_ROWS = {"train": 3000, "dev": 60}  # there is no end of them, and telling all of a record takes practice
SHORTEST, LONGEST = 80, 320  # characters of a row: at most about 120 tokens of the bundled vocabulary
LOOKED_AT = 0.15  # share of the books' paragraphs that are graded: they are many
PROMPT_WORDS = (0, 1, 2, 3, 4, 5)  # how much of a text may be given as its prompt
SENTENCE = re.compile(r".*?\w{3}[.!?][\"'”’)]*(?:\s+|$)")  # three letters: "St." and "U.S." end nothing
LISTING = re.compile(r"^[^A-Z\"]|;|[^\x00-\u024f\u2000-\u206f]")  # enumerations, scripts beyond Latin

Row = dict[str, str]
Rows = Callable[[Path, str, random.Random], Iterable[Row]]  # (corpus folder, "train" or "dev", draws) -> rows


def sections(corpus: Path, name: str, part: str) -> list[str]:
    """One source's sections, on this side of the held-out line."""
    source = next(source for source in SOURCES if source.name == name)
    return source.train_sections(corpus / "corpus") if part == "train" else source.held_out(corpus / "corpus")


def split_after_words(text: str, words: int) -> Row:
    """The first words are the prompt; the completion keeps the space that follows them."""
    end = re.match(rf"(?:\s*\S+){{{words}}}", text)
    cut = end.end() if end else 0
    return {"prompt": text[:cut], "completion": text[cut:]}


def sentence_runs(paragraph: str) -> Iterator[str]:
    """Consecutive runs of whole sentences, each as long as fits in a row; a sentence that does not fit is left out."""
    run = ""
    for sentence in SENTENCE.findall(paragraph):
        if run and len(run + sentence) > LONGEST:
            yield run.strip()
            run = ""
        run = run + sentence if len(sentence) <= LONGEST else ""
    yield run.strip()


def paragraph_rows(source: str) -> Rows:
    """Runs of prose sentences, each after a few words of its own."""

    def rows(corpus: Path, part: str, draws: random.Random) -> Iterator[Row]:
        for section in sections(corpus, source, part):
            for paragraph in section.split("\n"):
                runs = [run for run in sentence_runs(paragraph) if not LISTING.search(run)]
                yield from (split_after_words(run, draws.choice(PROMPT_WORDS)) for run in runs)

    return rows


def exchange(speeches: Sequence[str]) -> str:
    """The first speech and those after it that fit in a row."""
    text = speeches[0]
    for speech in speeches[1:]:
        if len(text) + len(speech) + 2 > LONGEST:
            break
        text += f"\n\n{speech}"
    return text


def play_rows(corpus: Path, part: str, draws: random.Random) -> Iterator[Row]:
    """Exchanges that begin with a speaker's name as prompt, or in the middle of a speech, or with nothing given."""
    speeches = sections(corpus, "tinyshakespeare", part)
    for start in range(len(speeches)):
        text = exchange(speeches[start : start + 8])
        speaker, _, spoken = text.partition("\n")
        if draws.random() < 0.5:
            yield {"prompt": speaker, "completion": f"\n{spoken}"}
        else:
            words = draws.choice(PROMPT_WORDS)
            yield split_after_words(spoken if words else text, words)


def author_rows(author: str) -> Rows:
    """First sentence as prompt, what fits of the rest of the paragraph as completion."""

    def rows(corpus: Path, part: str, draws: random.Random) -> Iterator[Row]:
        for line in (corpus / "authors" / author / f"{part}.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            text = next(sentence_runs(f"{row['prompt']} {row['completion']}"))
            if text.startswith(row["prompt"]):
                yield {"prompt": row["prompt"], "completion": text[len(row["prompt"]) :]}

    return rows


def school_grade(text: str) -> float:
    """Flesch-Kincaid: about the years of school it takes to read this. A syllable is a run of vowels."""
    words = re.findall(r"[a-z]+", text.lower())
    syllables = sum(max(1, len(re.findall(r"[aeiouy]+", word.removesuffix("e")))) for word in words)
    sentences = max(1, len(re.findall(r"[.!?]+", text)))
    return 0.39 * len(words) / sentences + 11.8 * syllables / max(1, len(words)) - 15.59


def reading_level(lowest: float, highest: float) -> Rows:
    """Runs of sentences from the books whose school grade lies between the two."""

    def rows(corpus: Path, part: str, draws: random.Random) -> Iterator[Row]:
        share = LOOKED_AT if part == "train" else 1.0
        for section in sections(corpus, "books_simple", part):
            for paragraph in section.split("\n"):
                if draws.random() < share:
                    runs = [run for run in sentence_runs(paragraph) if lowest <= school_grade(run) <= highest]
                    yield from (split_after_words(run, draws.choice(PROMPT_WORDS)) for run in runs)

    return rows


def table_rows(corpus: Path, part: str, draws: random.Random) -> Iterator[Row]:
    """A record as prompt, a text about it as completion; the names of dev rows occur nowhere else as whole names."""
    seed = draws.randrange(2**32)
    for table, text, _ in records.table_rows(seed, 2 * GENERATED_ROWS[part], held_out=part == "dev"):
        yield {"prompt": table, "completion": f"\n{text}"}


@dataclass(frozen=True)
class BundledPrefix:
    """A prefix that ships with the bundled model, and where its rows come from."""

    name: str
    rows: Rows
    counts: Mapping[str, int] = field(default_factory=lambda: ROWS)


PREFIXES = (
    BundledPrefix("plays", play_rows),
    BundledPrefix("speeches", paragraph_rows("us_speeches")),
    BundledPrefix("factbook", paragraph_rows("factbook")),
    BundledPrefix("carroll", author_rows("lewis_carroll")),
    BundledPrefix("wodehouse", author_rows("p_g_wodehouse")),
    BundledPrefix("easy", reading_level(-10, 1)),
    BundledPrefix("hard", reading_level(13, 40)),
    BundledPrefix("tables", table_rows, GENERATED_ROWS),
)


def choose(prefix: BundledPrefix, corpus: Path, part: str) -> list[Row]:
    """A sample of the rows of fitting length, no text twice; the names alone decide which."""
    draws = random.Random(f"{prefix.name}/{part}")
    by_text = {row["prompt"] + row["completion"]: row for row in prefix.rows(corpus, part, draws)}
    fitting = [row for text, row in by_text.items() if SHORTEST <= len(text) <= LONGEST and row["completion"].strip()]
    return draws.sample(fitting, min(prefix.counts[part], len(fitting)))


def write(corpus: Path, out: Path) -> None:
    """All files of all prefixes."""
    for prefix in PREFIXES:
        folder = out / prefix.name
        folder.mkdir(parents=True, exist_ok=True)
        for part in ROWS:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in choose(prefix, corpus, part)]
            (folder / f"{part}.jsonl").write_text("".join(lines), "utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m trainer.bundled.prefix_data", description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder that holds corpus/ and authors/")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    write(args.corpus, args.out)


if __name__ == "__main__":
    main()
