import json
import random
from pathlib import Path

import pytest

from trainer.bundled import prefix_data

WORDS = ("island", "country", "people", "border", "river", "king", "trade", "season", "coast", "mountain", "winter")
NAMES = ("plays", "speeches", "factbook", "carroll", "wodehouse", "easy", "hard", "tables")


def sentence(draws: random.Random) -> str:
    return " ".join(draws.choices(WORDS, k=9)).capitalize() + "."


@pytest.fixture(autouse=True)
def every_paragraph(monkeypatch):
    monkeypatch.setattr(prefix_data, "LOOKED_AT", 1.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files in the layout of the real data folder."""
    folder, draws = tmp_path_factory.mktemp("data"), random.Random(7)
    (folder / "corpus").mkdir()
    for name in ("us_speeches", "factbook"):
        blocks = ["\n".join(f"{sentence(draws)} {sentence(draws)}" for _ in range(3)) for _ in range(40)]
        (folder / "corpus" / f"{name}.txt").write_text("\n\n".join(blocks), "utf-8")
    speeches = [f"{draws.choice(('ROMEO', 'JULIET'))}:\n{sentence(draws)}" for _ in range(200)]
    (folder / "corpus" / "tinyshakespeare.txt").write_text("\n\n".join(speeches), "utf-8")
    for name in ("books_simple", "books_simple_valid"):
        paragraphs = [f"{easy(draws)}\n{hard(draws)}" for _ in range(30)]
        (folder / "corpus" / f"{name}.txt").write_text("\n\n".join(paragraphs), "utf-8")
    for name in ("lewis_carroll", "p_g_wodehouse"):
        author = folder / "authors" / name
        author.mkdir(parents=True)
        for part in ("train", "dev"):
            rows = [{"prompt": sentence(draws), "completion": sentence(draws)} for _ in range(20)]
            (author / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def easy(draws: random.Random) -> str:
    words = ["".join(map(draws.choice, ("bcdfgl", "aeiou", "mnprst"))) for _ in range(12)]
    return " ".join(
        f"{first.capitalize()} and a {second} ran." for first, second in zip(words[::2], words[1::2], strict=True)
    )


def hard(draws: random.Random) -> str:
    return f"{' '.join(draws.choices(('consideration', 'extraordinary', 'deliberately'), k=8))} {sentence(draws)}"


def written(folder: Path, name: str, part: str) -> list[dict[str, str]]:
    lines = (folder / name / f"{part}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def whole(row: dict[str, str]) -> str:
    return row["prompt"] + row["completion"]


def test_two_runs_write_the_same_bytes(data, tmp_path):
    for run in ("one", "two"):
        prefix_data.main(["--corpus", str(data), "--out", str(tmp_path / run)])
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.jsonl"))
    assert [str(file) for file in files] == sorted(
        f"{name}/{part}.jsonl" for name in NAMES for part in ("train", "dev")
    )
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


@pytest.mark.parametrize("name", NAMES)
def test_rows_fit_and_no_dev_sentence_is_trained_on(data, tmp_path, name):
    prefix_data.write(data, tmp_path)
    train, dev = written(tmp_path, name, "train"), written(tmp_path, name, "dev")
    assert train
    assert dev
    assert all(prefix_data.SHORTEST <= len(whole(row)) <= prefix_data.LONGEST for row in train + dev)
    assert all(row["completion"].strip() and set(row) == {"prompt", "completion"} for row in train + dev)
    seen = " ".join(whole(row) for row in train).lower()
    if name == "tables":  # a short text about a common thing may come twice, a record of unseen names cannot
        assert all(row["prompt"].lower() not in seen for row in dev)
        return
    last_sentences = [whole(row).rstrip(".").replace("\n", ". ").split(". ")[-1].lower() for row in dev]
    assert all(last not in seen for last in last_sentences)


@pytest.mark.parametrize("name", NAMES)
def test_completion_carries_the_space_after_its_prompt(data, tmp_path, name):
    prefix_data.write(data, tmp_path)
    for row in written(tmp_path, name, "train"):
        assert row["prompt"] == row["prompt"].strip()
        assert row["completion"][0].isspace() == bool(row["prompt"])


def test_plays_are_prompted_by_speakers_and_by_words(data, tmp_path):
    prefix_data.write(data, tmp_path)
    rows = written(tmp_path, "plays", "train")
    assert {row["prompt"] for row in rows} >= {"ROMEO:", "JULIET:", ""}
    assert all(row["completion"].startswith("\n") for row in rows if row["prompt"].endswith(":"))


@pytest.mark.parametrize(
    ("paragraph", "runs"),
    [
        ("Mount St. Helens erupted. It was loud!", ["Mount St. Helens erupted. It was loud!"]),
        (f"Short one. {'word ' * 80}end. After that.", ["Short one.", "After that."]),
        ("no end", [""]),
    ],
)
def test_sentence_runs(paragraph, runs):
    assert list(prefix_data.sentence_runs(paragraph)) == runs


def test_reading_levels_part_the_easy_from_the_hard(data, tmp_path):
    prefix_data.write(data, tmp_path)
    for name, (low, high) in {"easy": (-10, 1), "hard": (13, 40)}.items():
        for part in ("train", "dev"):
            assert all(low <= prefix_data.school_grade(whole(row)) <= high for row in written(tmp_path, name, part))


def test_school_grade_of_known_sentences():
    assert prefix_data.school_grade("The cat sat on the mat.") == pytest.approx(0.39 * 6 + 11.8 - 15.59)
    assert prefix_data.school_grade("Responsibility.") == pytest.approx(0.39 + 11.8 * 6 - 15.59)


def test_two_full_rows_of_sentences_are_two_runs():
    sentence = "A" + "a" * 170 + "."
    assert list(prefix_data.sentence_runs(f"{sentence} {sentence}")) == [sentence, sentence]
