"""The comparison's parts: noise as BART says, pretraining that can be cut off, ROUGE, and every arm on a few rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prefix_store.model import frozen
from tests.prove.bundled import DATA
from tests.prove.summarise import answers, comparison, copying, noise, pretrain, runs, tasks
from trainer.bundled.recipe import Budget

MASK, ROWS = 999, 6
TINY = dataclasses.replace(
    pretrain.Recipe(),
    size={
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    },
    windows=((0.0, 48),),
    batch_tokens=96,
    warmup_steps=4,
)
WORDS = ["the", "a", "cat", "dog", "old", "king", "queen", "saw", "went", "home", "sea", "said", "little", "house"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # between PEFT and transformers
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the texts in {DATA}")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors this small a second one only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pretrain.load_tokenizer()


@pytest.fixture(scope="module")
def documents() -> list[str]:
    draws = generator(0)
    return [" ".join(f"{' '.join(draws.choice(WORDS, 6))}." for _ in range(5)) for _ in range(60)]


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random one of the comparison's shape: three layers each, as its rivals expect."""
    recipe = dataclasses.replace(TINY, size={**TINY.size, "encoder_layers": 3})
    folder = tmp_path_factory.mktemp("model")
    pretrain.export(pretrain.Run(recipe, tokenizer), folder)
    return folder


@pytest.mark.parametrize("seed", range(20))
def test_infilling_hides_its_share_in_spans_and_changes_nothing_else(seed):
    length = 20 + 10 * seed
    ids = np.arange(length)
    masked = noise.infill(ids, MASK, 0.3, 3.0, generator(seed))
    chosen = noise.spans(length, 0.3, 3.0, generator(seed))
    assert sum(size for _, size in chosen) == round(0.3 * length)
    assert (masked == MASK).sum() == len(chosen)
    hidden = {place for first, size in chosen for place in range(first, first + size)}
    assert masked[masked != MASK].tolist() == [place for place in range(length) if place not in hidden]
    assert not ((masked[1:] == MASK) & (masked[:-1] == MASK)).any()
    assert np.array_equal(masked, noise.infill(ids, MASK, 0.3, 3.0, generator(seed)))
    assert not np.array_equal(masked, noise.infill(ids, MASK, 0.3, 3.0, generator(seed + 1)))


def test_a_mask_stands_where_its_span_was():
    """By the neighbours: between what stays on either side there is one mask and as many tokens less as it hides."""
    ids = np.arange(200)
    masked, chosen = noise.infill(ids, MASK, 0.3, 3.0, generator(1)), noise.spans(200, 0.3, 3.0, generator(1))
    for place, (first, size) in zip(np.flatnonzero(masked == MASK), chosen, strict=True):
        if 0 < place < len(masked) - 1:
            assert (masked[place - 1], masked[place + 1]) == (first - 1, first + size)


def test_spans_are_poisson_and_anywhere():
    """Sizes have Poisson's mean and share of empty ones; hidden places are spread evenly over the text."""
    found = [noise.spans(1000, 0.3, 3.0, generator(seed)) for seed in range(200)]
    sizes = np.array([size for chosen in found for _, size in chosen[:-1]])
    assert sizes.mean() == pytest.approx(3.0, abs=0.1)
    assert (sizes == 0).mean() == pytest.approx(np.exp(-3), abs=0.01)
    hidden = np.zeros(1000)
    for chosen in found:
        for first, size in chosen:
            hidden[first : first + size] += 1
    assert (hidden.reshape(10, 100).mean(1) / 200).tolist() == pytest.approx([0.3] * 10, abs=0.02)


def test_sentences_change_places_and_stay_whole(tokenizer):
    text = 'One two. Three "four!" Five? Six seven.\nEight'
    ids, ends = np.array(tokenizer(text, add_special_tokens=False).input_ids), noise.sentence_ends(tokenizer)
    orders = [tokenizer.decode(noise.permute(ids, ends, generator(seed))) for seed in range(30)]
    parts = ["One two.", ' Three "four!"', " Five?", " Six seven.\n", "Eight"]
    assert len(set(orders)) > 20
    for order in orders:
        assert all(part in order for part in parts)
        assert len(order) == len(text)
    assert orders[3] == tokenizer.decode(noise.permute(ids, ends, generator(3)))


def test_a_row_is_whole_sentences_which_the_decoder_is_to_say(tokenizer, documents):
    run, text = pretrain.Run(TINY, tokenizer), pretrain.read(documents, tokenizer)
    batch = run.batch(text, 48)
    bos, eos, mask, pad = (getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "mask", "pad"))
    assert len(batch.source) == len(batch.labels) > 1
    for source, decoder, labels in zip(batch.source, batch.decoder, batch.labels, strict=True):
        said = labels[labels >= 0].tolist()
        read = source[source != pad].tolist()
        assert (said[-1], read[0], decoder[0].item()) == (eos, bos, eos)
        assert decoder[1 : len(said)].tolist() == said[:-1]
        assert tokenizer.decode(said[:-1]).strip() in "\n".join(documents) + "\n"
        assert set(read) - {bos, mask} <= set(said)
        assert mask in read
    assert tokenizer.decode(text.ids[: text.ends[4]].tolist()) == documents[0] + "\n"


def fitted(texts: Path, folder: Path, steps: int = 24, **more: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    lines: list[str] = []
    options = {"report": lines.append, **more}
    found = pretrain.pretrain(texts, folder, Budget(60, steps), TINY, **options)
    return load_file(found / "model.safetensors"), lines


@pytest.fixture
def texts(documents, tmp_path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of a few kilobytes instead of the real one."""
    monkeypatch.setattr(pretrain, "shuffled_documents", lambda *_: documents)
    monkeypatch.setattr(pretrain.Recipe, "fingerprint", lambda *_: "tiny")
    (tmp_path / "books_simple_valid.txt").write_text("\n\n".join(documents), "utf-8")
    return tmp_path


def test_pretraining_that_was_cut_off_ends_where_the_other_does(texts, tmp_path):
    whole, _ = fitted(texts, tmp_path / "whole")

    def cut_off(line: str) -> None:
        if line.startswith("step 20 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(texts, tmp_path / "parts", report=cut_off, save_seconds=0)
    parts, lines = fitted(texts, tmp_path / "parts")
    assert lines[0].startswith("goes on from step 19 ")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    other, _ = fitted(texts, tmp_path / "other", steps=23)
    assert not torch.equal(whole["model.shared.weight"], other["model.shared.weight"])


@pytest.mark.parametrize("installed", [True, False])
def test_the_start_copies(tokenizer, monkeypatch, installed):
    """Of random tokens, where nothing but the source tells what comes: those that stand behind the same one there."""
    if not installed:
        monkeypatch.setattr(copying, "install", lambda model, draws: None)
    run = pretrain.Run(pretrain.Recipe(), tokenizer)
    rows = list(generator(0).integers(100, 6000, (8, 60)))
    batch = run.noisy(rows, seed=0)
    with torch.no_grad():
        read = {"input_ids": batch.source, "attention_mask": batch.real_mask.long()}
        said = run.model(**read, decoder_input_ids=batch.decoder).logits.argmax(-1)
    told = [
        (place, row)
        for row, source in enumerate(batch.source.tolist())
        for place, pair in enumerate(zip(batch.decoder[row].tolist(), batch.labels[row].tolist(), strict=True))
        if pair in set(pairwise(source))
    ]
    right = sum(bool(said[row, place] == batch.labels[row, place]) for place, row in told) / len(told)
    assert len(told) > 200
    assert right > 0.9 if installed else right < 0.02


def test_pretraining_learns(tokenizer, documents):
    run, text = pretrain.Run(TINY, tokenizer), pretrain.read(documents, tokenizer)
    losses = [run.update(run.batch(text, 48), TINY.rate(0, step)) for step in range(60)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_rouge_by_hand():
    """`the cat sat` against `the cat ran home`: 2 of 3 and of 4 words, 1 of 2 and of 3 pairs, the cat in a row."""
    one = tasks.rouge(["the cat sat"], [["the cat ran home"]])
    assert one == pytest.approx({"rouge1": 400 / 7, "rouge2": 40, "rougeL": 400 / 7})
    swapped = tasks.rouge(["cat the sat"], [["the cat ran home"]])
    assert swapped == pytest.approx({"rouge1": 400 / 7, "rouge2": 0, "rougeL": 200 / 7})


def test_rouge_takes_the_best_reference_and_the_mean_of_answers():
    references = [["a dog", "the cats sat"], ["nothing"]]
    assert tasks.rouge(["the cat sat", "anything else"], references) == dict.fromkeys(tasks.MEASURES, 50)


def test_the_engine_and_transformers_write_the_same(model):
    """Arms of both kinds are searched alike: 6 beams, length penalty 0.8."""
    served, plain = frozen.load(model), frozen.load(model)
    with torch.no_grad():
        for one in (served, plain):  # a fresh model says one thing over and over
            for number, parameter in enumerate(one.model.parameters()):
                more = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.add_(0.1 * more)
    sources = [(0, 300, 400, 500, 600), (0, 700, 800), (0, 900, 42, 17, 5, 1000, 1100)]
    written = answers.by_engine(served, sources, None)
    assert written == answers.by_transformers(plain.model, plain.tokenizer, sources)
    assert len(set(written)) == len(sources)


@real
def test_tasks_are_fixed_and_do_not_leak():
    for name in tasks.NAMES:
        task, again = tasks.load(name), tasks.load(name)
        assert task == again
        assert not {row["prompt"] for row in task.test} & {row["prompt"] for row in task.dev}
        assert len(task.dev) == tasks.DEV
        assert all(row["references"] for row in task.test)
    dialogues = tasks.load(tasks.DIALOGUES)
    assert (len(dialogues.train), len(dialogues.test)) == (450, 500)
    assert {len(row["references"]) for row in dialogues.test} == {3}


@real
@pytest.mark.parametrize("arm", comparison.arms())
def test_every_arm_runs(model, arm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers, "ANSWER", 8)
    rates = comparison.arms()[arm] or (0.0,)
    run = {"task": tasks.DIALOGUES, "arm": arm, "rate": rates[0], "seed": 0, "steps": 2}
    found = runs.measure(model, run, rows=ROWS)
    assert {"rate", *tasks.MEASURES, "trainable", "kept", "samples"} <= set(found)
    assert (found["trainable"] > 0) == bool(comparison.arms()[arm])
    if arm == "prefix":
        assert found["kept"] == 2 * 32 * runs.VIRTUAL_TOKENS * 9  # three layers of three attentions
    row = comparison.mean([found, found])
    assert f"| {arm} |" in comparison.table(measured({arm: row}))


def measured(found: dict[str, Any]) -> dict[str, Any]:
    every = dict.fromkeys(tasks.NAMES, found)
    return {"parameters": 7_000_000, "pretraining": {"steps": 100, "tokens": 400_000}, "tasks": every}


def test_what_is_missed():
    def arms(prefix: float) -> dict[str, Any]:
        return {arm: {"rougeL": prefix if arm == "prefix" else 10.0} for arm in comparison.arms()}

    assert comparison.missed(measured(arms(11))) == []
    assert len(comparison.missed(measured(arms(10)))) == len(tasks.NAMES)
    absent = {name: arm for name, arm in arms(11).items() if name != "top layer"}
    assert comparison.missed(measured(absent)) == [f"{task}: top layer finished" for task in tasks.NAMES]


def test_the_mean_is_over_seeds_with_its_standard_error():
    several = [
        {**dict.fromkeys(tasks.MEASURES, value), "loss": 2.0, "rate": 0.1, "samples": []} for value in (1.0, 2.0, 3.0)
    ]
    found = comparison.mean(several)
    assert (found["rouge1"], found["loss"], found["seeds"]) == (2.0, 2.0, 3)
    assert found["rougeL_error"] == pytest.approx(1 / 3**0.5)
